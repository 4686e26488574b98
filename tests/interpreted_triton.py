"""The Triton kernels under Triton's interpreter, on CPU tensors; and what the interpreter of Triton
3.6 gets wrong, put right.

For a process with TRITON_INTERPRET=1: the interpreter is chosen while functions are defined, those
of Triton itself too.

- loops over a kernel argument: NumPy >= 2.4 refuses int() of an array of one element;
- bfloat16: casts cut off instead of rounding to nearest even, and `tl.dot` multiplies the bits as
  if they were integers;
- inline assembly: missing. Here the instructions that the kernels use are carried out as they are
written.
"""

from types import SimpleNamespace

import numpy as np
import torch
from triton.runtime import interpreter, jit

from qvlm_hf.ops import triton_kernels as kernels

if not jit.knobs.runtime.interpret:
    raise RuntimeError("this needs a process with TRITON_INTERPRET=1.")

__all__ = ["kernels"]

_tensor_patch, _cast, _dot = (
    interpreter._patch_lang_tensor,
    interpreter.InterpreterBuilder.cast_impl,
    interpreter.InterpreterBuilder.create_dot,
)
_tl = interpreter.tl


_builtins = {}


def _patch_builtin(package, builder, scope):
    """The same as the original, which looks through every name of a package anew at every call of
    every function.
    """
    if package not in _builtins:
        _builtins[package] = [
            name for name in dir(package) if _tl.core.is_builtin(getattr(package, name))
        ]
    for name in _builtins[package]:
        if _tl.core.is_builtin(member := getattr(package, name)):
            interpreter._patch_attr(package, name, member, builder, scope)


def _patch_lang_tensor(tensor, scope):
    _tensor_patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _cast_impl(self, src, dst_type):
    if src.dtype.scalar == _tl.float32 and dst_type.scalar == _tl.bfloat16:
        rounded = torch.from_numpy(np.array(src.data)).to(torch.bfloat16).view(torch.uint16).numpy()
        return interpreter.TensorHandle(rounded, dst_type.scalar)
    return _cast(self, src, dst_type)


def _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    if a.dtype.scalar == _tl.bfloat16:
        a, b = (_cast(self, operand, _tl.float32) for operand in (a, b))
    return _dot(self, a, b, d, input_precision, max_num_imprecise_acc)


_INSTRUCTIONS = {
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "xor.b32": np.bitwise_xor,
    "shr.b32": np.right_shift,
}


def _create_inline_asm(self, code, constraints, values, types, is_pure, pack):
    """Instructions on bytes, four to a register; `$0` is the result, `$1` the argument."""
    assert (constraints, pack, len(values), len(types)) == ("=r,r", 4, 1, 1)
    registers = {"$1": np.ascontiguousarray(values[0].data).view(np.uint32)}
    for instruction in filter(None, map(str.strip, code.split(";"))):
        name, target, *sources = instruction.replace(",", " ").split()
        operands = [
            registers[source] if source in registers else np.uint32(int(source, 0))
            for source in sources
        ]
        registers[target] = _INSTRUCTIONS[name](*operands)
    result = interpreter.TensorHandle(registers["$0"].view(np.int8), _tl.int8)
    return SimpleNamespace(get_result=lambda index: result)


interpreter._patch_builtin = _patch_builtin
interpreter._patch_lang_tensor = _patch_lang_tensor
interpreter.InterpreterBuilder.cast_impl = _cast_impl
interpreter.InterpreterBuilder.create_dot = _create_dot
interpreter.InterpreterBuilder.create_inline_asm = _create_inline_asm
