"""Small atomic datasets, written as RecBole reads them, and configs that read them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from recbole_uip.bridge import UIPConfig, UIPDataset
from recbole_uip.bridge.loading import ROW

LENIENCY = {"source": "constant", "weight": "contrast", "bins": 6, "half_life": [5, "inf"]}
COMPANY = {
    "source": "collaborative",
    "weight": "contrast",
    "rank": 4,
    "codes": 4,
    "match": {"rank": 4, "bins": 6, "half_life": ["inf"]},
}
FACETS = {"leniency": LENIENCY, "company": COMPANY}
BY_TIME = {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "TO", "group_by": None, "mode": "labeled"}


@dataclass
class Atomic:
    """An atomic dataset that a test can change before it is written.

    ``rows`` holds user, item, rating and time of each interaction.
    """

    folder: Path
    name: str = "small"
    rows: list[list] = field(default_factory=list)
    columns: tuple[str, ...] = ("user_id:token", "item_id:token", "rating:float", "timestamp:float")
    users: bool = True
    items: list[tuple[str, str, str]] | None = None

    def write(self) -> Atomic:
        path = self.folder / self.name
        path.mkdir(parents=True, exist_ok=True)
        kept = [name.split(":")[0] for name in self.columns]
        order = [("user_id", "item_id", "rating", "timestamp").index(name) for name in kept]
        self._table(
            path / f"{self.name}.inter",
            self.columns,
            [[row[index] for index in order] for row in self.rows],
        )
        if self.users:
            people = sorted({row[0] for row in self.rows})
            self._table(
                path / f"{self.name}.user",
                ("user_id:token", "age:token"),
                [[user, len(user) % 3] for user in people],
            )
        if self.items is not None:
            header = ("item_id:token", "title:token_seq", "genre:token_seq")
            self._table(path / f"{self.name}.item", header, self.items)
        return self

    @staticmethod
    def _table(path: Path, header, rows) -> None:
        lines = ["\t".join(map(str, line)) for line in [header, *rows]]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def config(self, model: str = "FM", **settings) -> UIPConfig:
        inter = [column.split(":")[0] for column in self.columns]
        load_col = {"inter": inter}
        if self.users:
            load_col["user"] = ["user_id", "age"]
        if self.items is not None:
            load_col["item"] = ["item_id", "genre"]
        defaults = {
            "data_path": str(self.folder),
            "checkpoint_dir": str(self.folder / "saved"),
            "load_col": load_col,
            "threshold": {"rating": 4} if "rating" in inter else None,
            "eval_args": BY_TIME,
            "epochs": 1,
            "train_batch_size": 256,
            "eval_batch_size": 256,
            "show_progress": False,
            "use_gpu": False,
            "gpu_id": "",
            "uip_facets": FACETS,
            "uip_folds": 2,
        }
        return UIPConfig(model, self.name, config_dict={**defaults, **settings})


def make_rows(rng: np.random.Generator, n_users=40, n_items=15, n_rows=400) -> list[list]:
    """Interactions of users with different tastes and thresholds; times have ties."""
    pairs = rng.permutation(n_users * n_items)[:n_rows]
    user, item = pairs // n_items, pairs % n_items
    taste = rng.normal(size=(n_users, 2)) @ rng.normal(size=(2, n_items))
    score = 3.4 + taste[user, item] + rng.normal(size=n_users)[user]
    rating = np.clip(np.rint(score + rng.normal(scale=0.5, size=n_rows)), 1, 5).astype(int)
    # float32 cannot tell these times apart: only the exact raw time keeps their order.
    time = 978_300_000 + rng.integers(0, n_rows // 2, size=n_rows)
    return [
        [f"u{u}", f"i{i}", int(r), int(t)]
        for u, i, r, t in zip(user, item, rating, time, strict=True)
    ]


def make_items(n_items=15) -> list[tuple[str, str, str]]:
    return [
        (f"i{item}", f"Film {item}", "Drama Comedy" if item % 2 else "Horror")
        for item in range(n_items)
    ]


@pytest.fixture
def atomic(tmp_path, rng) -> Atomic:
    return Atomic(tmp_path, rows=make_rows(rng), items=make_items())


@pytest.fixture
def small(atomic) -> Atomic:
    return atomic.write()


def rows_of(split: UIPDataset) -> np.ndarray:
    return split.inter_feat[ROW].numpy()


def field_table(dataset: UIPDataset) -> dict[str, np.ndarray]:
    """Every profile field over all rows, in the input's order."""
    return {field.name: field.values for field in dataset.profiles.fields}
