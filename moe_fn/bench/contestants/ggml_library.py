"""ctypes bindings of ggml's shared library: the functions for a graph of experts."""

import ctypes
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_POINTER, _INT, _LONG, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
_PARTS = ("ggml-base", "ggml-cpu", "ggml")  # in the order of their dependencies
_PACKAGES = ("ggml", "llama_cpp")
_CONTEXT_BYTES = 2**22  # for descriptions of a graph's tensors, without their data

# Return type and argument types of each function.
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_new_tensor_2d": (_POINTER, (_POINTER, _INT, _LONG, _LONG)),
    "ggml_new_tensor_3d": (_POINTER, (_POINTER, _INT, _LONG, _LONG, _LONG)),
    "ggml_view_2d": (_POINTER, (_POINTER, _POINTER, _LONG, _LONG, _SIZE, _SIZE)),
    "ggml_mul_mat_id": (_POINTER, (_POINTER, _POINTER, _POINTER, _POINTER)),
    "ggml_swiglu": (_POINTER, (_POINTER, _POINTER)),
    "ggml_mul": (_POINTER, (_POINTER, _POINTER, _POINTER)),
    "ggml_add": (_POINTER, (_POINTER, _POINTER, _POINTER)),
    "ggml_cont": (_POINTER, (_POINTER, _POINTER)),
    "ggml_new_graph": (_POINTER, (_POINTER,)),
    "ggml_build_forward_expand": (None, (_POINTER, _POINTER)),
    "ggml_set_input": (None, (_POINTER,)),
    "ggml_set_output": (None, (_POINTER,)),
    "ggml_gallocr_new": (_POINTER, (_POINTER,)),
    "ggml_gallocr_alloc_graph": (ctypes.c_bool, (_POINTER, _POINTER)),
    "ggml_backend_cpu_init": (_POINTER, ()),
    "ggml_backend_cpu_set_n_threads": (None, (_POINTER, _INT)),
    "ggml_backend_get_default_buffer_type": (_POINTER, (_POINTER,)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_POINTER, (_POINTER, _POINTER)),
    "ggml_backend_tensor_set": (None, (_POINTER, _POINTER, _SIZE, _SIZE)),
    "ggml_backend_tensor_get": (None, (_POINTER, _POINTER, _SIZE, _SIZE)),
    "ggml_backend_graph_compute": (_INT, (_POINTER, _POINTER)),
    "ggml_backend_get_device": (_POINTER, (_POINTER,)),
    "ggml_backend_dev_backend_reg": (_POINTER, (_POINTER,)),
    "ggml_backend_reg_get_proc_address": (_POINTER, (_POINTER, ctypes.c_char_p)),
}


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", _SIZE), ("mem_buffer", _POINTER), ("no_alloc", ctypes.c_bool))


@dataclass(frozen=True)
class Library:
    """The library's functions by name."""

    functions: dict[str, Callable[..., Any]]

    def call(self, name: str, *arguments: Any) -> Any:
        """Calls a function; pointers are integers."""
        return self.functions[name](*arguments)

    def call_in(self, context: int, name: str, *arguments: Any) -> Any:
        """Calls a function whose first argument is a context."""
        return self.call(name, context, *arguments)

    def context(self) -> int:
        """A new context for descriptions of tensors."""
        found: int = self.call("ggml_init", _InitParams(_CONTEXT_BYTES, None, True))
        return found

    def repacking(self, backend: int) -> int:
        """The buffer type that repacks weights for this CPU on writing, as in llama.cpp; else the default one."""
        device = self.call("ggml_backend_get_device", backend)
        of_name = self.call(
            "ggml_backend_reg_get_proc_address", self.call("ggml_backend_dev_backend_reg", device), _EXTRA
        )
        kinds = ctypes.CFUNCTYPE(ctypes.POINTER(_POINTER), _POINTER)(of_name)(device) if of_name else None
        plain: int = self.call("ggml_backend_get_default_buffer_type", backend)
        if kinds is None:
            return plain
        every: list[int] = []
        while (kind := kinds[len(every)]) is not None:
            every.append(kind)
        return next((kind for kind in every if b"REPACK" in self.call("ggml_backend_buft_name", kind)), plain)


_EXTRA = b"ggml_backend_dev_get_extra_bufts"
_LOG = ctypes.CFUNCTYPE(None, _INT, ctypes.c_char_p, _POINTER)
_silent = _LOG(lambda level, text, context: None)  # module level, since the library keeps its address


def found_library() -> Path | None:
    """The folder of ggml's library, or None."""
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or ()) if spec is not None else ():
            if (folder := Path(place) / "lib") and all((folder / f"lib{part}.so").exists() for part in _PARTS):
                return folder
    return None


def loaded(folder: Path) -> Library:
    """The functions of the library in that folder."""
    parts = [ctypes.CDLL(str(folder / f"lib{part}.so"), mode=ctypes.RTLD_GLOBAL) for part in _PARTS]
    functions = {}
    signatures = _FUNCTIONS | {
        "ggml_init": (_POINTER, (_InitParams,)),
        "ggml_backend_buft_name": (ctypes.c_char_p, (_POINTER,)),
        "ggml_log_set": (None, (_LOG, _POINTER)),
    }
    for name, (result, arguments) in signatures.items():
        function = next(getattr(part, name) for part in parts if hasattr(part, name))
        function.restype, function.argtypes = result, arguments
        functions[name] = function
    functions["ggml_log_set"](_silent, None)
    return Library(functions)
