"""Published figures: scores of the papers' tables, and cost of the attentions.

recipes/ has a file for each score. tools.table prints the scores beside those of runs, and tools.profile the
cost beside that of this code.
"""

from __future__ import annotations

from typing import NamedTuple

#: Sources of the scores, as printed below the tables.
ICCV = "ICCV paper"
ICCV_RECURRENCE = "ICCV paper, table of the number of loops"
ICCV_CONTEXT = "ICCV paper, table of the context modules"
TPAMI = "TPAMI version, as quoted by readers of the paper"
TPAMI_ABSTRACT = "abstract of the TPAMI version"
ORIGINAL = "README of the original repository, three runs"


class Row(NamedTuple):
    """A row of a table: a recipe and its published mean IoU.

    Attributes:
        label: name of the row.
        recipe: name of the recipe (engine/recipes.py).
        scores: published mean IoU in percent, one for each run.
        source: where the scores were published.
    """

    label: str
    recipe: str
    scores: tuple[float, ...]
    source: str

    @property
    def published(self) -> str:
        """Return the scores as published: with two decimals, if one of them has two."""
        decimals = 1 if all(score == round(score, 1) for score in self.scores) else 2
        return ", ".join(f"{score:.{decimals}f}" for score in self.scores)


class Table(NamedTuple):
    """A published table.

    Attributes:
        rows: its rows.
        scores_of: what the scores are of, for people.
        data: name of the data set (--dataset).
    """

    rows: tuple[Row, ...]
    scores_of: str = "Cityscapes val, single scale"
    data: str = "cityscapes"


#: Tables by the name that tools.table takes.
TABLES: dict[str, Table] = {
    "context": Table(
        (
            Row("baseline", "fcn_r101_cityscapes", (75.1,), ICCV_CONTEXT),
            Row("GCN", "gcn_r101_cityscapes", (78.1,), TPAMI),
            Row("PSP", "psp_r101_cityscapes", (78.5,), ICCV_CONTEXT),
            Row("ASPP", "aspp_r101_cityscapes", (78.9,), ICCV_CONTEXT),
            Row("non-local", "nonlocal_r101_cityscapes", (79.1,), TPAMI),
            Row("RCCA, R=2", "ccnet_r101_cityscapes", (79.8,), ICCV_CONTEXT),
            Row("RCCA, R=2, CCL", "ccnet_r101_ccl_cityscapes", (80.5,), TPAMI),
        )
    ),
    "context50": Table(
        (
            Row("baseline", "fcn_r50_cityscapes", (73.3,), ICCV_CONTEXT),
            Row("PSP", "psp_r50_cityscapes", (76.4,), ICCV_CONTEXT),
            Row("ASPP", "aspp_r50_cityscapes", (77.1,), ICCV_CONTEXT),
            Row("non-local", "nonlocal_r50_cityscapes", (77.3,), ICCV_CONTEXT),
            Row("non-local, R=2", "nonlocal_r50_recurrence2_cityscapes", (78.7,), TPAMI),
            Row("RCCA, R=2", "ccnet_r50_cityscapes", (78.5,), ICCV_CONTEXT),
        )
    ),
    "recurrence": Table(
        (
            Row("baseline, R=0", "fcn_r101_cityscapes", (75.1,), ICCV_RECURRENCE),
            Row("R=1", "ccnet_r101_recurrence1_cityscapes", (78.0,), ICCV_RECURRENCE),
            Row("R=2", "ccnet_r101_cityscapes", (79.8,), ICCV_RECURRENCE),
            Row("R=3", "ccnet_r101_recurrence3_cityscapes", (80.2,), ICCV_RECURRENCE),
        )
    ),
    "original": Table(
        (
            Row("R=1", "ccnet_r101_recurrence1_cityscapes", (77.31, 77.91, 76.89), ORIGINAL),
            Row("R=2", "ccnet_r101_cityscapes", (79.74, 79.22, 78.40), ORIGINAL),
            Row("R=2, OHEM", "ccnet_r101_ohem_cityscapes", (78.67, 80.00, 79.83), ORIGINAL),
        )
    ),
    "ade20k": Table(
        (
            Row("RCCA, R=2", "ccnet_r101_ade20k", (45.22,), ICCV),
            Row("RCCA, R=2, CCL", "ccnet_r101_ccl_ade20k", (45.76,), TPAMI_ABSTRACT),
        ),
        "ADE20K val, averaged over five sizes",
        "ade20k",
    ),
    "lip": Table((Row("RCCA, R=2, CCL", "ccnet_r101_ccl_lip", (55.47,), TPAMI_ABSTRACT),), "LIP val", "lip"),
    "camvid": Table(
        (
            Row("RCCA, T=1", "ccnet_r101_camvid", (77.9,), TPAMI),
            Row("3-D RCCA, T=5", "ccnet3d_r101_camvid", (79.1,), TPAMI),
        ),
        "CamVid test",
        "camvid",
    ),
}

#: GFLOPs and memory (MB) of the attention by model and recurrence (ICCV, tables 3 and 5; the last one is of
#: TPAMI; input 3x769x769).
ATTENTION_COST: dict[tuple[str, int | None], tuple[float, float]] = {
    ("ccnet", 1): (8.3, 53),
    ("ccnet", 2): (16.5, 127),
    ("ccnet", 3): (24.7, 208),
    ("nonlocal", 1): (108, 1411),
    ("nonlocal", 2): (216, 2820),
}
