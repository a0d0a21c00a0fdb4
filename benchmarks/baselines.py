"""Score trivial predictors that use only the position or only the color of a pixel.

    python -m benchmarks.baselines --data-dir D [--train-list L --val-list L] [--num-classes K] [--out JSON]

The predictors are fitted on the training split and scored on the validation split by mean IoU without void
pixels. Row prior: the most frequent class at each relative height. Position prior: the most frequent class in
each cell of a grid. Mean color: the class with the nearest mean BGR color. Without lists, the data set has
the layout of Cityscapes.
"""

import json

import numpy as np
import torch

from dataset import CSDataSet, DataError
from dataset.labels import IGNORE, NUM_CLASSES
from engine.evaluation.metrics import confusion_matrix, mean_iou
from tools.common import end
from utils import args as flags
from utils.files import check_output_file, write_file

ROWS, COLUMNS = 128, 32  # cells of the priors over the picture


class Baselines:
    """Predictors that use the statistics of a training split.

    Args:
        pairs: iterable of (image [h, w, 3] BGR, label [h, w] train ids).
        num_classes: number of classes K.
    """

    def __init__(self, pairs, num_classes: int = NUM_CLASSES):
        counts = np.zeros((ROWS * COLUMNS, num_classes), np.int64)
        sums = np.zeros((num_classes, 3))
        for image, label in pairs:
            known = label != IGNORE
            row, column = _cells(label.shape)
            keys = (row * COLUMNS + column)[known] * num_classes + label[known]
            counts += np.bincount(keys, minlength=counts.size).reshape(counts.shape)
            classes, colors = label[known], image[known]
            for channel in range(3):
                sums[:, channel] += np.bincount(classes, colors[:, channel], num_classes)
        grid = counts.reshape(ROWS, COLUMNS, num_classes)
        self._row = grid.sum(1).argmax(-1)
        self._cell = grid.argmax(-1)
        total = counts.sum(0)
        means = sums / np.maximum(total, 1)[:, None]
        self._colors = means.astype(np.float32)  # [K, 3]
        self._lengths = np.where(total > 0, (means**2).sum(1), np.inf).astype(np.float32)

    def row_prior(self, image: np.ndarray) -> np.ndarray:
        """Predict the most frequent class at the height of each pixel."""
        row, column = _cells(image.shape[:2])
        return self._row[row + 0 * column]

    def position_prior(self, image: np.ndarray) -> np.ndarray:
        """Predict the most frequent class in the grid cell of each pixel."""
        return self._cell[_cells(image.shape[:2])]

    def mean_color(self, image: np.ndarray) -> np.ndarray:
        """Predict the class with the nearest mean color."""
        # |x - m|^2 = |x|^2 - 2 x m + |m|^2; the first term is the same for every class.
        return (self._lengths - 2 * image.astype(np.float32) @ self._colors.T).argmin(-1)

    def scores(self, pairs) -> dict[str, float]:
        """Return the mean IoU of each predictor over (image, label) pairs."""
        num_classes = len(self._colors)
        predictors = {
            "row_prior": self.row_prior,
            "position_prior": self.position_prior,
            "mean_color": self.mean_color,
        }
        total = {name: torch.zeros(num_classes, num_classes, dtype=torch.int64) for name in predictors}
        for image, label in pairs:
            for name, predict in predictors.items():
                prediction = torch.from_numpy(predict(image))
                total[name] += confusion_matrix(torch.from_numpy(label), prediction, num_classes, IGNORE)
        return {name: mean_iou(confusion) for name, confusion in total.items()}


def _cells(shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the grid row [h, 1] and column [1, w] of each pixel."""
    height, width = shape
    return (np.arange(height) * ROWS // height)[:, None], (np.arange(width) * COLUMNS // width)[None, :]


def whole_pictures(root: str, list_path: str | None, split: str, num_classes: int = NUM_CLASSES):
    """Yield (image [h, w, 3] BGR 0..255, train ids int64 [h, w]) for each picture of a data set."""
    data = CSDataSet(root, list_path, None, (0, 0, 0), num_classes=num_classes, split=split)
    for index in range(len(data)):
        picture = data.picture(index, instances=False)
        assert picture.label is not None  # these splits have labels
        yield picture.image, picture.label.astype(np.int64)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark. Return the exit status."""
    parser = flags.Parser(prog="python -m benchmarks.baselines", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data-dir",
        required=True,
        help="data set in the layout of Cityscapes, or the folder to which the lists are relative",
    )
    parser.add_argument(
        "--train-list", help="list of image<TAB>label lines for the fit (default: split train)"
    )
    parser.add_argument("--val-list", help="list of image<TAB>label lines for the score (default: split val)")
    parser.add_argument(
        "--num-classes",
        type=flags.classes,
        default=NUM_CLASSES,
        help="number of classes (default: %(default)s)",
    )
    parser.add_argument("--out", metavar="FILE", help="JSON file to write the scores to")
    args = parser.parse_args(argv)
    if args.out:
        check_output_file("--out", args.out)
    try:
        train = whole_pictures(args.data_dir, args.train_list, "train", args.num_classes)
        val = whole_pictures(args.data_dir, args.val_list, "val", args.num_classes)
        scores = Baselines(train, args.num_classes).scores(val)
    except DataError as error:
        parser.error(str(error))
    for name, score in scores.items():
        print(f"{name.replace('_', ' '):<15} mean IoU {score:.4f}")
    if args.out:
        write_file(args.out, json.dumps(scores, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    end(main)
