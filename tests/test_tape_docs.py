"""docs/tape.md: its code runs, in order, and prints what it says."""

import contextlib
import io
import re
from pathlib import Path

from pykern.tape import tape

BLOCKS = re.compile(r"```python\n(.*?)```\n(?:```text\n(.*?)```\n)?", re.DOTALL)


def test_the_code_prints_what_the_page_says():
    tape.clear()
    page = (Path(__file__).parent.parent / "docs" / "tape.md").read_text(encoding="utf-8")
    blocks, names = BLOCKS.findall(page), {}
    assert len(blocks) == page.count("```python") == page.count("```text")
    for code, expected in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "docs/tape.md", "exec"), names)
        assert printed.getvalue() == expected
