"""Triton's interpreter with less set-up: the same kernels and the same numbers for about half of the CPU time."""

import sys

_REPLACED = ("GridExecutor", "InterpretedFunction", "InterpreterError", "_get_np_dtype", "_patch_lang")


def set_up_once() -> None:
    """Do once in a launch what the interpreter does for each call of a device function, where it has been imported.

    Triton (3.7) replaces the functions of triton.language for each such call: a third of the time of a sort. For the
    type of each tensor it makes a table of all types: a tenth. Other versions of Triton are left as they are.
    """
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None or not all(hasattr(interpreter, name) for name in _REPLACED):
        return
    launch, replaced = interpreter.GridExecutor.__call__, set()

    def launch_anew(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        replaced.clear()
        return launch(self, *args, **kwargs)

    def call(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        module = self.fn.__module__  # its globals name what is replaced
        if module not in replaced:
            interpreter._patch_lang(self.fn)
            replaced.add(module)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.GridExecutor.__call__ = launch_anew
    interpreter.InterpretedFunction.__call__ = call
    made, of_type = {}, interpreter._get_np_dtype

    def of_type_once(type):  # type: ignore[no-untyped-def]
        name = type.scalar.name
        if name not in made:
            made[name] = of_type(type)
        return made[name]

    interpreter._get_np_dtype = of_type_once
