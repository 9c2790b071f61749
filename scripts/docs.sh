#!/usr/bin/env bash
# docs.sh: the API reference, every public name with its docstring, as HTML in build/docs.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
install_checkout cli,docs,trio

out=$root/build/docs
# A page that was renamed must not live on beside its successor.
rm -rf "$out"
# Not from the checkout: the installed package is what is documented, as it is what is tested.
cd /
# pdoc lists a package's re-exported names only where __all__ has them.
"$venv/bin/python" - --docformat google --no-show-source --output-directory "$out" isojob \
    isojob.seccomp isojob.seccomp.evaluator <<'PYTHON'
import types

import isojob
import pdoc.__main__

for name in isojob._LATER:
    getattr(isojob, name)
isojob.__all__ = [
    name
    for name, value in vars(isojob).items()
    if not name.startswith("_") and not isinstance(value, types.ModuleType)
]
pdoc.__main__.cli()
PYTHON
[[ -s $out/isojob.html ]] || die "pdoc wrote no page for isojob"
printf '%s\n' "$out/index.html"
