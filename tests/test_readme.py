"""The README's example runs as it stands."""

import re

from tests.support import TOP


def test_the_loss_example_runs():
    section = (TOP / "README.md").read_text().split("## The loss in your own code")[1]
    section = section.split("\n## ")[0]
    assert len(section.strip().splitlines()) <= 30
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)
    names = {}
    exec(code, names)
    assert names["loss"] > 0
    assert (names["queue"].image_id[:8] == names["image_id"]).all()
