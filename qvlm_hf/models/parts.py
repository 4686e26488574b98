"""Where the parts and the repeated layers of a model of any family lie, from its modules alone."""

from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["PartNames", "is_norm", "layers_of", "shared_weights"]


@dataclass(frozen=True)
class PartNames:
    """Where vision encoder and language model lie in a model: names, "" for the model itself.

    Attributes:
        vision: None if there is none.
        language: the decoder.
        between: what holds both.
    """

    vision: str | None
    language: str
    between: str

    @classmethod
    def of(cls, model: Any) -> "PartNames":
        """Asks the model, and its classes where it does not know."""
        names = {id(module): name for name, module in model.named_modules()}
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
        encoder = model.get_encoder("image") if hasattr(model, "get_encoder") else None
        language = names.get(id(decoder), "")
        vision = names.get(id(encoder)) or None
        if vision is not None and _lies_in(language, vision):
            vision = None
        if vision is None:  # a picture model is said so by its class
            inputs = ("pixel_values", "flattened_patches")
            named = (
                name
                for name, module in model.named_modules()
                if name and getattr(module, "main_input_name", None) in inputs
            )
            vision = next((name for name in named if not _lies_in(language, name)), None)
        # of a model that is the decoder itself "" is shared
        return cls(vision, language, _common(vision or language, language))

    def component(self, name: str) -> str:
        """The part of the model that a module lies in, by its name alone."""
        inside = [
            (len(prefix), part)
            for part, prefix in (("vision", self.vision), ("language", self.language))
            if prefix is not None and (prefix == "" or _lies_in(name, prefix))
        ]
        return max(inside)[1] if inside else "projector"


def _lies_in(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _common(a: str, b: str) -> str:
    """The longest path that two module names share, short of the names themselves."""
    first, second = a.split(".")[:-1], b.split(".")[:-1]
    shared = [x for x, y in zip(first, second, strict=False) if x == y]
    return ".".join(shared)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, by the name of its class."""
    return "norm" in type(module).__name__.lower() and not any(
        isinstance(part, nn.Linear) for part in module.modules()
    )


def layers_of(model: nn.Module) -> dict[str, str]:
    """Linear module -> the ModuleList entry around it: innermost with a norm, else outermost."""
    modules = dict(model.named_modules())
    with_norm = {
        ".".join(parts[:i])
        for name, module in modules.items()
        if is_norm(module)
        for parts in [name.split(".")]
        for i in range(1, len(parts))
    }
    found = {}
    for name, module in modules.items():
        if type(module) is not nn.Linear:
            continue
        parts = name.split(".")
        entries = [
            ".".join(parts[:i])
            for i in range(2, len(parts))
            if parts[i - 1].isdigit()
            and isinstance(modules[".".join(parts[: i - 1])], nn.ModuleList)
        ]
        normed = [entry for entry in entries if entry in with_norm]
        if entries:
            found[name] = normed[-1] if normed else entries[0]
    return found


def shared_weights(model: nn.Module) -> dict[str, str]:
    """Linear module -> another parameter's module with the same weight."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    return {
        name: next(other for other in names if other != name)
        for names in owners.values()
        for name in names
        if len(set(names)) > 1
    }
