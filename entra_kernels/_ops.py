"""The namespace of the custom ops. On Hugging Face's hub another module stands in place of this one.

There each build has a namespace of its own, so that two of them, and the installed package, can be loaded side by side.
"""


def add_op_namespace_prefix(op_name: str) -> str:
    """The name under which torch registers the op `op_name`."""
    return f"entra_kernels::{op_name}"
