"""What the open art lacks, drawn by hand: rows of shapes, as the storyworld has them, standing on (0, 0)."""

from __future__ import annotations

DRAWINGS: dict[str, tuple] = {
    "rope": (
        ("oval", "tan", 0, -0.25, 0.4, 0.25), ("oval", "brown", 0, -0.25, 0.26, 0.15), ("oval", "tan", 0, -0.28, 0.2, 0.1),
        ("curve", "tan", 0.1, (0.3, -0.15), (0.55, -0.02), (0.6, -0.1)),
    ),
    "table": (
        ("box", "brown", -0.5, -0.55, -0.4, 0, 0.02), ("box", "brown", 0.4, -0.55, 0.5, 0, 0.02), ("box", "tan", -0.6, -0.65, 0.6, -0.52, 0.03),
    ),
}
