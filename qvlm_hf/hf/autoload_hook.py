"""Tells Transformers of "qvlm" in programs that never import qvlm_hf.

`qvlm autoload install` copies the text of this file into a `.pth` file, where it runs when a
program imports Transformers' table of quantization methods: so it stands alone and has no types.
The table gets an entry for "qvlm" that imports qvlm_hf once a checkpoint asks for it; every other
program that uses Transformers is spared the import, and whatever could go wrong in it. Nothing
raised here reaches the program: a table that cannot be taught is one line of warning, and without
qvlm_hf nothing happens at all.
"""

__all__ = ["TABLE", "find", "teach"]

TABLE = "transformers.quantizers.auto"


def find(finder):
    """The spec of `TABLE` as other finders have it, with a loader that calls `teach` at the end."""
    from importlib.util import find_spec

    finder.asking = True  # the others are asked through sys.meta_path, where it stands as well
    try:
        spec = find_spec(TABLE)
    finally:
        finder.asking = False
    if spec is not None and spec.loader is not None:
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            if module.__name__ == TABLE:  # a zip file has one loader for all
                teach(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
    return spec


def teach(module):
    """Enters "qvlm" into the table of `module`, if qvlm_hf is installed and has not done so."""

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

        warn(
            f"qvlm autoload does not fit this Transformers ({error!r}): import qvlm_hf, or run: "
            f"qvlm autoload remove",
            stacklevel=2,
        )
