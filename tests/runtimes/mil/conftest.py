"""Small MIL programs, built with coremltools' builder, saved and read back."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgestill.runtimes.mil.interpreter import Interpreter
from edgestill.runtimes.mil.program import Program
from edgestill.runtimes.milproto import import_coremltools, load_program

Build = Callable[..., Any]


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """``save(body, *specs)``: the package of a program whose function is ``body(mb, *inputs)``, no pass run over it."""
    ct = import_coremltools()
    from coremltools.converters.mil.mil import Builder as mb  # noqa: N813  the name of MIL's builder everywhere

    def build(body: Build, *specs: tuple[tuple[Any, ...], str], states: tuple[Any, ...] = ()) -> Path:
        from coremltools.converters.mil.mil import types

        dtypes = {"float16": types.fp16, "float32": types.fp32, "int32": types.int32, "bool": types.bool}
        inputs = [mb.TensorSpec(shape=shape, dtype=dtypes[dtype]) for shape, dtype in specs]
        inputs += [mb.StateTensorSpec(shape=shape, dtype=dtypes[dtype]) for shape, dtype in states]
        names = [f"input{i}" for i in range(len(inputs))]
        source = f"def function({', '.join(names)}):\n    return body(mb, {', '.join(names)})\n"
        scope = {"body": body, "mb": mb}
        exec(source, scope)  # the builder reads the argument names off the function
        decorated = mb.program(input_specs=inputs, opset_version=ct.target.iOS18)(scope["function"])
        model = ct.convert(
            decorated, convert_to="mlprogram", minimum_deployment_target=ct.target.iOS18, skip_model_load=True,
            pass_pipeline=ct.PassPipeline.EMPTY, compute_precision=ct.precision.FLOAT32,
        )  # fmt: skip
        package = tmp_path / f"{len(list(tmp_path.iterdir()))}.mlpackage"
        model.save(str(package))
        shutil.rmtree(model.package_path, ignore_errors=True)
        return package

    return build


@pytest.fixture
def program(save: Callable[..., Path]) -> Callable[..., Program]:
    """The same, read back."""
    return lambda *arguments, **options: load_program(save(*arguments, **options))


@pytest.fixture
def interpret(program: Callable[..., Program]) -> Callable[..., Interpreter]:
    """The same, ready to run."""
    return lambda *arguments, **options: Interpreter(program(*arguments, **options))
