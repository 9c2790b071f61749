"""Writes ``_libseccomp.py``, the declarations of libseccomp's functions in cffi's own format.

Run it after a change here: ``python -m isojob.seccomp._build_libseccomp``. The result is committed,
because reading C declarations takes pycparser and half a second, and loading the result neither.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

__all__ = ["generate"]

_DECLARATIONS = """
typedef void *scmp_filter_ctx;
struct scmp_arg_cmp {
    unsigned int arg;
    int op;
    uint64_t datum_a;
    uint64_t datum_b;
};
int seccomp_syscall_resolve_name_arch(uint32_t arch_token, const char *name);
char *seccomp_syscall_resolve_num_arch(uint32_t arch_token, int num);
scmp_filter_ctx seccomp_init(uint32_t def_action);
void seccomp_release(scmp_filter_ctx ctx);
int seccomp_arch_add(scmp_filter_ctx ctx, uint32_t arch_token);
int seccomp_arch_remove(scmp_filter_ctx ctx, uint32_t arch_token);
uint32_t seccomp_arch_native(void);
int seccomp_attr_set(scmp_filter_ctx ctx, int attr, uint32_t value);
int seccomp_rule_add_array(scmp_filter_ctx ctx, uint32_t action, int syscall,
                           unsigned int arg_cnt, const struct scmp_arg_cmp *arg_array);
int seccomp_export_bpf(scmp_filter_ctx ctx, int fd);
void free(void *ptr);
"""

_HEADER = """\
# Written by _build_libseccomp.py; do not edit.
# fmt: off
# ruff: noqa: E501, Q000
# mypy: ignore-errors
# pyright: basic, reportAttributeAccessIssue=false, reportMissingImports=false
"""


def generate() -> str:
    """The text of ``_libseccomp.py``."""
    import cffi  # which needs pycparser for cdef()

    builder = cffi.FFI()
    builder.cdef(_DECLARATIONS)
    builder.set_source("isojob.seccomp._libseccomp", None)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "_libseccomp.py"
        builder.emit_python_code(str(target))
        return _HEADER + target.read_text()


if __name__ == "__main__":
    Path(__file__).with_name("_libseccomp.py").write_text(generate())
