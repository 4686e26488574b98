"""Tells Transformers of "qvlm" in programs that never import qvlm_hf: the text of this file runs at every start of Python.

`qvlm autoload install` copies it into a `.pth` file, so it stands alone, is short, has no types and imports nothing but sys. When
Transformers has imported its table of quantization methods, the table gets an entry for "qvlm" that imports qvlm_hf once a checkpoint asks
for it: every other program that uses Transformers is spared the import, and whatever could go wrong in it. Nothing raised here reaches the
program: a table that cannot be taught is one line of warning, and without qvlm_hf nothing happens at all.
"""

import sys

__all__ = ["TABLE", "QVLMFinder", "start", "teach"]

TABLE = "transformers.quantizers.auto"


def start():
    """Teaches the table if it is there already, and otherwise as soon as it is imported."""
    if TABLE in sys.modules:
        teach(sys.modules[TABLE])
    else:
        sys.meta_path.insert(0, QVLMFinder)


class QVLMFinder:
    """Lets the loader of `TABLE` call `teach` at the end. Stays in sys.meta_path: other threads may be walking through it."""

    asking = False

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        """What the other finders find for `TABLE`, and nothing for any other name."""
        if name != TABLE or cls.asking:
            return None
        from importlib.util import find_spec

        cls.asking = True  # the others are asked through sys.meta_path, where this class stands as well
        try:
            spec = find_spec(name)
        finally:
            cls.asking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                if module.__name__ == TABLE:  # a zip file has one loader for all
                    teach(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def teach(module):
    """Enters "qvlm" into the table of configurations in `module`, unless qvlm_hf is not installed or has entered it."""

    class Promise:
        """Stands for QVLMConfig until a configuration is read; importing qvlm_hf replaces it."""

        @classmethod
        def from_dict(cls, fields, **options):
            from qvlm_hf import QVLMConfig

            return QVLMConfig.from_dict(fields, **options)

    try:
        from importlib.util import find_spec

        if find_spec("qvlm_hf") is not None:
            module.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault("qvlm", Promise)
    except Exception as error:
        from warnings import warn

        warn(f"qvlm autoload does not fit this Transformers ({error!r}): import qvlm_hf, or run: qvlm autoload remove", stacklevel=2)
