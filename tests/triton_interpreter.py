"""Triton's interpreter, repaired and made strict, for the tests of the kernels' results without a GPU.

`install` repairs what Triton 3.6 to 3.9 computes wrongly (bf16 arithmetic, `range` over run-time bounds, `and` and `or`
between blocks) and turns silent faults into errors (an access outside the launch's tensors, int32 overflow, a failed
`device_assert`). `interleave` runs the programs of a grid under a random schedule, so that a protocol between programs,
or its absence, shows.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

assert triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 must be set before triton is first imported"

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle
Array = np.ndarray[Any, Any]
Call = Callable[..., Any]

_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
_COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)


@functools.cache
def install() -> None:
    """Repair the interpreter and make it strict, once a process."""
    _repair_bfloat16()
    _repair_range()
    _repair_bool_operators()
    _patch_once()
    # debug: device_assert fails, and int32 arithmetic that overflows does too
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True)
    _check_bounds()


# ---- speed


def _patch_once() -> None:
    """Let the language stay patched: to do that afresh at every call of a device function is half of a test's time."""
    patch = interpreter._patch_lang
    patched: set[int] = set()

    class Kept:
        def restore(self) -> None:
            """Nothing is taken back."""

    def patch_lang(function: Any) -> Any:
        if id(function.__globals__) not in patched:
            patch(function)
            patched.add(id(function.__globals__))
        return Kept()

    interpreter._patch_lang = patch_lang
    of_scalar = functools.cache(interpreter._get_np_dtype)  # it makes a table anew at every load

    def get_np_dtype(kind: Any) -> Any:
        return np.dtype(np.uint64) if isinstance(kind.scalar, tl.pointer_type) else of_scalar(kind.scalar)

    interpreter._get_np_dtype = get_np_dtype


# ---- bf16: the interpreter keeps its bits in uint16 and then computes with those


def _is_bfloat16(handle: Any) -> bool:
    return getattr(handle, "dtype", None) is not None and handle.dtype.scalar == tl.bfloat16


def _widened(handle: Any) -> Any:
    if not _is_bfloat16(handle):
        return handle
    return Handle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _round_to_bfloat16(values: Array) -> Array:
    """The bits of float32 values rounded to the nearest bf16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).reshape(np.shape(values))
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    quiet_nan = ((bits >> 16) | 0x40).astype(np.uint16)
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, quiet_nan, rounded)


def _narrowed(handle: Any) -> Any:
    return Handle(_round_to_bfloat16(handle.data), tl.bfloat16)


def _repair_bfloat16() -> None:
    """Compute in float32 and round once, as the compiled kernel does."""
    binary, unary, cast, dot = Builder.binary_op, Builder.unary_op, Builder.cast_impl, Builder.create_dot
    fma, convert, reduce_sum = Builder.create_fma, Builder.create_fp_to_fp, interpreter.ReduceOps.sum

    def binary_op(self: Any, left: Any, right: Any, operation: Any) -> Any:
        bfloat16 = operation not in _BITWISE and _is_bfloat16(left) and _is_bfloat16(right)
        if operation in _COMPARISONS:  # the interpreter types the result as its operands, which a broadcast acts on
            if bfloat16:
                left, right = _widened(left), _widened(right)
            return Handle(operation(left.data, right.data), tl.int1)
        if bfloat16:
            return Handle(_round_to_bfloat16(operation(_widened(left).data, _widened(right).data)), tl.bfloat16)
        return binary(self, left, right, operation)

    def unary_op(self: Any, argument: Any, operation: Any) -> Any:
        if _is_bfloat16(argument):
            return _narrowed(unary(self, _widened(argument), operation))
        return unary(self, argument, operation)

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        before, after = source.dtype.scalar, to.scalar
        if before == after or tl.bfloat16 not in (before, after):
            return cast(self, source, to)
        if before == tl.bfloat16:
            return _widened(source) if after == tl.float32 else cast(self, _widened(source), to)
        return _narrowed(source if before == tl.float32 else cast(self, source, tl.float32))

    def create_fp_to_fp(self: Any, source: Any, to: Any, rounding: Any) -> Any:
        if tl.bfloat16 in (source.dtype.scalar, to.scalar):
            return self.cast_impl(source, to)
        return convert(self, source, to, rounding)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if _is_bfloat16(z):
            return _narrowed(fma(self, _widened(x), _widened(y), _widened(z)))
        return fma(self, x, y, z)

    def create_dot(self: Any, a: Any, b: Any, accumulator: Any, precision: Any, imprecise: Any) -> Any:
        return dot(self, _widened(a), _widened(b), accumulator, precision, imprecise)

    def total(self: Any, block: Any) -> Any:
        if not _is_bfloat16(block.handle):
            return reduce_sum(self, block)
        values = np.sum(_widened(block.handle).data, axis=self.axis, keepdims=self.keep_dims)
        rounded = _round_to_bfloat16(values)
        return self.to_tensor(rounded if rounded.ndim else rounded.item(), tl.bfloat16)

    Builder.binary_op, Builder.unary_op, Builder.cast_impl = binary_op, unary_op, cast_impl
    Builder.create_fp_to_fp, Builder.create_fma, Builder.create_dot = create_fp_to_fp, create_fma, create_dot
    Builder.get_bf16 = lambda self, value: _narrowed(Handle(np.array([value], np.float32), tl.float32))
    interpreter.ReduceOps.sum = total


# ---- Python constructs


def _repair_range() -> None:
    """Make `range(n)` with a run-time n work: NumPy 2.4 no longer turns a one-element array into an index."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def _bool_operator(name: str, left: Any, right: Call) -> Any:
    if isinstance(left, tl.tensor) and left.handle.data.size > 1:
        return left & right() if name == "and" else left | right()
    if name == "and":
        return right() if left else left
    return left if left else right()


def _repair_bool_operators() -> None:
    """Make `and` and `or` between blocks elementwise, as the compiler has them."""
    transformer = interpreter.ASTTransformer
    visit_assign = transformer.visit_Assign

    def visit_bool_op(self: Any, node: ast.BoolOp) -> ast.expr:
        self.generic_visit(node)
        name = ast.Constant("and" if isinstance(node.op, ast.And) else "or")
        result = node.values[-1]
        for value in reversed(node.values[:-1]):
            none = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
            later = ast.Lambda(none, result)
            result = ast.Call(ast.Name(_bool_operator.__name__, ast.Load()), [name, value, later], [])
        return result

    def visit_assignment(self: Any, node: ast.Assign) -> Any:
        node.value = self.visit(node.value)
        return visit_assign(self, node)

    # the rewritten kernel finds the names of this module among its globals
    interpreter._bool_operator = _bool_operator
    transformer.visit_BoolOp, transformer.visit_Assign = visit_bool_op, visit_assignment


# ---- out of bounds


def _storages(value: Any) -> Iterator[tuple[int, int]]:
    """(address, bytes) of the memory behind every tensor in `value`."""
    if isinstance(value, torch.Tensor):
        yield value.untyped_storage().data_ptr(), value.untyped_storage().nbytes()
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _storages(item)
    elif isinstance(getattr(value, "base", None), torch.Tensor):
        yield from _storages(value.base)


def _check_bounds() -> None:
    """Raise IndexError where a program touches memory that belongs to no tensor of its launch."""
    launches: list[list[tuple[int, int]]] = []
    run = interpreter.GridExecutor.__call__
    load, store = Builder.create_masked_load, Builder.create_masked_store
    update, swap = Builder.create_atomic_rmw, Builder.create_atomic_cas

    def launch(self: Any, *arguments: Any, **options: Any) -> Any:
        launches.append(list(_storages([*arguments, *options.values()])))
        try:
            with np.errstate(all="ignore"):  # kernels may divide by zero in lanes that they then discard
                return run(self, *arguments, **options)
        finally:
            launches.pop()

    def check(what: str, pointers: Any, mask: Array) -> None:
        shape = np.broadcast_shapes(pointers.data.shape, mask.shape)
        addresses = np.broadcast_to(pointers.data, shape)[np.broadcast_to(mask, shape)]
        if not addresses.size or not launches:
            return
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        inside = np.zeros(addresses.shape, bool)
        for start, size in launches[-1]:
            inside |= (addresses >= np.uint64(start)) & (addresses + np.uint64(width) <= np.uint64(start + size))
        if not inside.all():
            program = interpreter.interpreter_builder.grid_idx
            wrong = f"{int((~inside).sum())} of {inside.size} lanes"
            raise IndexError(f"out-of-bounds {what} of {width} bytes in program {program}: {wrong}")

    def as_handle(mask: Any) -> Any:
        return mask if isinstance(mask, Handle) else Handle(np.asarray(mask), tl.int1)

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        check("load", pointers, as_handle(mask).data)
        return load(self, pointers, as_handle(mask), *rest, **options)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        check("store", pointers, as_handle(mask).data)
        return store(self, pointers, value, as_handle(mask), *rest, **options)

    def atomic_rmw(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check("atomic", pointers, mask.data)
        return update(self, operation, pointers, value, mask, *rest)

    def atomic_cas(self: Any, pointers: Any, *rest: Any) -> Any:
        check("atomic", pointers, np.ones(pointers.data.shape, bool))
        return swap(self, pointers, *rest)

    interpreter.GridExecutor.__call__ = launch
    Builder.create_masked_load, Builder.create_masked_store = masked_load, masked_store
    Builder.create_atomic_rmw, Builder.create_atomic_cas = atomic_rmw, atomic_cas


# ---- schedules


class _Schedule:
    """One thread a program; only the thread whose turn it is runs, and every switch point passes the turn at random."""

    def __init__(self, seed: int, max_switches: int) -> None:
        self._random, self._turns, self._self = random.Random(seed), threading.Condition(), threading.local()
        self._max_switches = max_switches
        self._alive: list[Any] = []
        self._turn: Any = None
        self._left = 0
        self._error: BaseException | None = None

    def run(self, function: Call, programs: list[tuple[Any, dict[str, Any]]]) -> None:
        """Run the programs, each an index and its arguments, to their ends.

        Raises:
            TimeoutError: they switch without end: a deadlock or livelock.
        """
        self._alive, self._error, self._left = [index for index, _ in programs], None, self._max_switches
        threads = [threading.Thread(target=self._body, args=(function, *item), daemon=True) for item in programs]
        for thread in threads:
            thread.start()
        with self._turns:
            self._pass_turn()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def switch(self) -> None:
        """Let another program run; called at every switch point."""
        me = getattr(self._self, "index", None)
        if me is None:
            return
        with self._turns:
            self._left -= 1
            if self._left < 0 and self._error is None:
                self._error = TimeoutError("deadlock or livelock: the programs switch without end")
            self._pass_turn()
            self._wait(me)

    def _body(self, function: Call, me: Any, arguments: dict[str, Any]) -> None:
        self._self.index = me
        try:
            with self._turns:
                self._wait(me)
            function(**arguments)
        except BaseException as error:
            with self._turns:
                self._error = self._error or error
        with self._turns:
            self._alive.remove(me)
            self._pass_turn()

    def _wait(self, me: Any) -> None:
        while self._turn != me and self._error is None:
            self._turns.wait(1)
        if self._error is not None:
            raise self._error
        interpreter.interpreter_builder.grid_idx = me

    def _pass_turn(self) -> None:
        self._turn = self._random.choice(self._alive) if self._alive else None
        self._turns.notify_all()


@contextlib.contextmanager
def interleave(seed: int = 0, *, fine: bool = False, max_switches: int = 200_000) -> Iterator[None]:
    """Run the programs of each launch under a random schedule.

    Args:
        seed: of the schedule.
        fine: switch at loads and stores too, not at atomics alone.
        max_switches: a launch that switches more often than this is taken to hang.

    Raises:
        TimeoutError: a launch hangs (wrapped in Triton's InterpreterError).
    """
    schedule = _Schedule(seed, max_switches)
    run = interpreter.GridExecutor.__call__

    def launch(self: Any, *arguments: Any, **options: Any) -> Any:
        # the executor calls its function once a program: collect those calls and run them together at the last one
        function, programs = self.fn, []

        @functools.wraps(function)
        def collect(**program_arguments: Any) -> None:
            builder = interpreter.interpreter_builder
            programs.append((builder.grid_idx, program_arguments))
            if len(programs) == int(np.prod(builder.grid_dim)):
                schedule.run(function, programs)

        collect.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        self.fn = collect
        try:
            return run(self, *arguments, **options)
        finally:
            self.fn = function

    points = ["create_atomic_rmw", "create_atomic_cas"]
    points += ["create_masked_load", "create_masked_store"] if fine else []
    saved = {name: getattr(Builder, name) for name in points}

    def switching(operation: Call) -> Call:
        def switch_first(self: Any, *arguments: Any, **options: Any) -> Any:
            schedule.switch()
            return operation(self, *arguments, **options)

        return switch_first

    for name, operation in saved.items():
        setattr(Builder, name, switching(operation))
    interpreter.GridExecutor.__call__ = launch
    try:
        yield
    finally:
        interpreter.GridExecutor.__call__ = run
        for name, operation in saved.items():
            setattr(Builder, name, operation)
