"""Predict pictures, folders, lists, videos and cameras.

    python -m tools.predict INPUT [INPUT ...] --restore-from CKPT [--out DIR]

An input is a picture, a folder (with its subfolders), a list (.txt or .lst: one path in each line, relative
to the list), a video, or camera:N. Results are written to DIR, under the name and subfolder of the input:

    overlay/        colors of the classes over the picture (JPEG; videos: a video)
    color/          colors of the classes (PNG with a palette, values are train ids; videos: a video)
    labelIds/       ids of the class table (PNG; videos: one for each frame)
    probabilities/  with --save probabilities: float16 [K, h, w] (.npy)
    sheet.jpg       contact sheet of up to 24 pictures, with a legend

Pictures may have any size. Pictures larger than --input-size are predicted in tiles, as by evaluate.py.
Unreadable inputs are skipped and named at the end, with exit status 2. A camera runs until Ctrl-C. If a
result would replace an input, nothing is written.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import cv2
import numpy as np
from PIL import Image

from dataset import DataError, clips
from dataset.pictures import decode_upright, load
from engine.options import AveragingOptions, InferenceOptions, add_flags
from segmenter import Prediction, Segmenter
from tools import common
from tools.sources import (
    PictureFile,
    Video,
    check_video_name,
    count_files,
    find,
    first_names,
    frames,
    further_pages,
)
from utils import args as flags
from utils.drawing.palette import colored, save_gray_png, save_indexed_png
from utils.drawing.sheet import Sheet, overlay
from utils.errors import RunError
from utils.files import check_outputs, check_writable, replacing
from utils.progress import Progress

OVERLAY, COLOR, LABEL_IDS, PROBABILITIES = KINDS = ("overlay", "color", "labelIds", "probabilities")
ENDINGS = {OVERLAY: ".jpg", COLOR: ".png", LABEL_IDS: ".png", PROBABILITIES: ".npy"}
#: Results of a video that are videos, and those that are one file for each frame.
FILMED, FRAMES = (OVERLAY, COLOR), (LABEL_IDS, PROBABILITIES)
SHEET = "sheet.jpg"
#: Number of pictures to read ahead and of results to queue for writing; threads for each.
AHEAD, THREADS = 4, 3


def kinds(text: str) -> tuple[str, ...]:
    """Parse the value of --save."""
    chosen = tuple(part.strip() for part in text.split(","))
    if unknown := [kind for kind in chosen if kind not in KINDS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(KINDS)}")
    return chosen


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = common.Parser("predict", __doc__)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="picture, folder, list, video or camera:N")
    add("--out", default="predictions", metavar="DIR", help="output folder (default: %(default)s)")
    add(
        "--save",
        type=kinds,
        default=(OVERLAY, COLOR, LABEL_IDS),
        metavar="KIND,KIND",
        help=f"results to write, separated by commas: {', '.join(KINDS)} (default: the first three)",
    )
    add(
        "--opacity",
        type=flags.fraction,
        default=0.5,
        help="opacity of the overlay's colors (default: %(default)s)",
    )
    add(
        "--input-size",
        type=flags.size,
        default=(769, 769),
        metavar="H,W",
        help="size of the tiles (default: 769,769); smaller pictures are predicted as a whole",
    )
    add("--whole", action="store_true", help="predict every picture as a whole, without tiles")
    add_flags(parser, AveragingOptions)
    add(
        "--frames", type=flags.positive_int, metavar="N", help="maximum number of frames of a video or camera"
    )
    add_flags(parser, InferenceOptions)
    common.add_network_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command. Return 0."""
    args = get_parser().parse_args(argv)
    pictures, videos = find(args.inputs, leave_out=os.path.realpath(args.out))
    network = common.open_network(args)
    check_written(args, pictures, videos, network)
    check_writable("--out", args.out)
    sheet = Sheet(network.names, network.palette)
    work = Work(args, network, sheet)
    unreadable: list[str] = []
    try:
        if pictures:
            work.predict_pictures(pictures, unreadable)
        for video in videos:
            try:
                work.predict_video(video)
            except DataError as error:
                unreadable.append(str(error))
    finally:
        if work.done:
            with replacing(os.path.join(args.out, SHEET)) as temporary:
                sheet.draw().save(temporary, quality=90)
            print(f"{args.out}: {work.done} pictures ({', '.join(args.save)}); {SHEET} shows {sheet.shown}")
        if work.cut:
            names = first_names(sorted(work.cut))
            print(f"skipped further pages of {count_files(len(work.cut))}: {names}")
    if unreadable:
        for line in unreadable[:-1]:
            print(line, file=sys.stderr)
        several = f" ({len(unreadable)} inputs were skipped)" if len(unreadable) > 1 else ""
        raise DataError(unreadable[-1] + several)
    return 0


def result_path(out: str, kind: str, name: str) -> str:
    """Return the path of a result of a picture or frame."""
    return os.path.join(out, kind, f"{name}{ENDINGS[kind]}")


def film_path(out: str, kind: str, video: Video) -> str:
    """Return the path of a result of a video that is a video itself."""
    return os.path.join(out, kind, f"{video.name}.mp4")


def check_written(
    args: argparse.Namespace,
    pictures: Sequence[PictureFile],
    videos: Sequence[Video],
    network: Segmenter,
) -> None:
    """Check that no result would replace an input, and that all results can be written.

    Raises:
        UsageError: one line that names the file.
    """
    inputs = [picture.path for picture in pictures]
    inputs += [video.path for video in videos if isinstance(video.path, str)]
    inputs += [path for path in args.inputs if os.path.isfile(path)]
    results = [os.path.join(args.out, SHEET)]
    results += [result_path(args.out, kind, picture.name) for picture in pictures for kind in args.save]
    for video in videos:
        check_video_name(os.path.abspath(args.out))
        results += [film_path(args.out, kind, video) for kind in FILMED if kind in args.save]
        for kind in FRAMES:
            if kind in args.save:
                # The number of frames is unknown until they are read: check the files that exist.
                folder = os.path.join(args.out, kind, video.name)
                results += glob.glob(os.path.join(glob.escape(folder), f"*{ENDINGS[kind]}"))
    check_outputs("--out", results, [*inputs, *network.files])


class Work:
    """Predict with a network, and write the results that the flags ask for."""

    def __init__(self, args: argparse.Namespace, network: Segmenter, sheet: Sheet):
        self.args = args
        self.network = network
        self.sheet = sheet
        self.palette = network.palette
        self.label_ids = network.labels.label_ids()
        self.done = 0
        self.cut: list[str] = []  # files of several pages, of which the first is predicted

    def predict_pictures(self, pictures: list[PictureFile], unreadable: list[str]) -> None:
        """Predict pictures; threads read files ahead and write results while the network works.

        Args:
            pictures: the files.
            unreadable: receives a line about each file that can't be read.
        """
        progress = Progress(len(pictures))
        finder = self.network.frames
        if finder.clip > 1:
            print(clips.say_missing(pictures[0].path, [finder.of(each.path) for each in pictures]))

        def read(source: PictureFile) -> np.ndarray | DataError:
            try:
                encoded = load(source.path)
                if pages := further_pages(encoded):
                    self.cut.append(f"{source.path} (1 of {1 + pages} predicted)")
                if finder.clip > 1:
                    return clips.read_rgb(finder.of(source.path))
                return cv2.cvtColor(decode_upright(encoded), cv2.COLOR_BGR2RGB)
            except DataError as error:
                return error

        with ThreadPoolExecutor(THREADS) as readers, ThreadPoolExecutor(THREADS) as writers:
            written: deque[Future] = deque()
            for number, (source, picture) in enumerate(_ahead(readers, read, pictures), 1):
                if isinstance(picture, DataError):
                    unreadable.append(str(picture))
                else:
                    prediction = self.predict(picture)
                    laid_over = self._show(source.name, self._middle(picture), prediction)
                    written.append(writers.submit(self._write, source.name, laid_over, prediction))
                while len(written) > AHEAD:
                    written.popleft().result()
                progress.show(number)
            for future in written:
                future.result()

    def predict_video(self, video: Video) -> None:
        """Predict the frames of a video or camera.

        Raises:
            DataError: it can't be read.
        """
        rate, total, pictures = frames(video, self.args.frames)
        progress = Progress(total, "frame")
        with contextlib.ExitStack() as stack:
            films = {
                kind: stack.enter_context(Film(film_path(self.args.out, kind, video), rate))
                for kind in FILMED
                if kind in self.args.save
            }
            # Ctrl-C ends a camera; the frames so far are the result.
            ends = contextlib.suppress(KeyboardInterrupt) if video.is_camera else contextlib.nullcontext()
            with ends, contextlib.closing(pictures):  # type: ignore[type-var]
                around = clips.of_video(pictures, self.network.frames.clip, self.network.frames.stride)
                for number, picture in enumerate(around, 1):
                    prediction = self.predict(picture)
                    name = f"{video.name}/{number:06d}"
                    laid_over = self._show(name, self._middle(picture), prediction)
                    if OVERLAY in films:
                        films[OVERLAY].add(laid_over)
                    if COLOR in films:
                        films[COLOR].add(colored(prediction.classes, self.palette))
                    self._write_values(name, prediction)
                    progress.show(number)

    def predict(self, picture: np.ndarray) -> Prediction:
        """Predict a picture uint8 [h, w, 3] RGB, or the middle frame of a clip [h, w, 3 * T], of any size."""
        args = self.args
        return self.network.predict(
            picture,
            scales=args.scales,
            flip=args.flip,
            tile_size=None if args.whole else args.input_size,
            probabilities=PROBABILITIES in args.save,
        )

    def _middle(self, picture: np.ndarray) -> np.ndarray:
        """Return the middle frame of a clip, uint8 [h, w, 3]."""
        first = self.network.frames.clip // 2 * 3
        return np.ascontiguousarray(picture[..., first : first + 3])

    def _show(self, name: str, picture: np.ndarray, prediction: Prediction) -> np.ndarray:
        """Add a picture to the sheet. Return its overlay, uint8 [h, w, 3] RGB."""
        self.done += 1
        laid_over = overlay(picture, prediction.classes, self.palette, self.args.opacity)
        self.sheet.add(name, picture, laid_over, prediction.classes)
        return laid_over

    def _write(self, name: str, laid_over: np.ndarray, prediction: Prediction) -> None:
        """Write the results of a picture."""
        if OVERLAY in self.args.save:
            with replacing(self._path(OVERLAY, name)) as temporary:
                Image.fromarray(laid_over).save(temporary, quality=92)
        if COLOR in self.args.save:
            save_indexed_png(self._path(COLOR, name), prediction.classes, self.palette)
        self._write_values(name, prediction)

    def _write_values(self, name: str, prediction: Prediction) -> None:
        """Write label ids and probabilities of a picture or frame."""
        if LABEL_IDS in self.args.save:
            save_gray_png(self._path(LABEL_IDS, name), self.label_ids[prediction.classes])
        if prediction.probabilities is not None:
            with replacing(self._path(PROBABILITIES, name)) as temporary:
                np.save(temporary, prediction.probabilities.astype(np.float16))

    def _path(self, kind: str, name: str) -> str:
        path = result_path(self.args.out, kind, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return path


class Film(contextlib.ExitStack):
    """A video file, written atomically.

    The first frame gives the size of the video. Other frames are resized.
    """

    def __init__(self, path: str, rate: float):
        super().__init__()
        self.path = path
        self.rate = rate
        self._writer: cv2.VideoWriter | None = None
        self._size = 0, 0
        self._frames = 0

    def add(self, frame: np.ndarray) -> None:
        """Add a frame, uint8 [h, w, 3] RGB.

        Raises:
            RunError: OpenCV can't write the video.
        """
        if self._writer is None:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            temporary = self.enter_context(replacing(self.path))
            self._size = frame.shape[1], frame.shape[0]
            self._writer = cv2.VideoWriter(temporary, cv2.VideoWriter.fourcc(*"mp4v"), self.rate, self._size)
            self.push(lambda error, *_: self._finish(temporary, failed=error is not None))
            if not self._writer.isOpened():
                raise RunError(f"{self.path}: OpenCV can't write this video; remove its kind from --save")
        if frame.shape[1::-1] != self._size:
            frame = cv2.resize(frame, self._size, interpolation=cv2.INTER_NEAREST)
        self._writer.write(np.ascontiguousarray(frame[..., ::-1]))
        self._frames += 1

    def _finish(self, path: str, failed: bool) -> None:
        """Close the video and check that it holds all frames: OpenCV does not report a full disk."""
        assert self._writer is not None
        self._writer.release()
        if failed or not self._frames:
            return
        written = cv2.VideoCapture(path)
        frames = int(written.get(cv2.CAP_PROP_FRAME_COUNT)) if written.isOpened() else 0
        written.release()
        if frames != self._frames:
            raise RunError(f"{self.path}: can't be written; free disk space, then run it again")


def _ahead(
    threads: ThreadPoolExecutor,
    read: Callable[[PictureFile], np.ndarray | DataError],
    sources: list[PictureFile],
) -> Iterator[tuple[PictureFile, np.ndarray | DataError]]:
    """Yield each source with its content, reading a few sources ahead."""
    waiting: deque[tuple[PictureFile, Future]] = deque()
    for source in sources:
        waiting.append((source, threads.submit(read, source)))
        if len(waiting) > AHEAD:
            first, future = waiting.popleft()
            yield first, future.result()
    for first, future in waiting:
        yield first, future.result()


if __name__ == "__main__":
    common.end(main)
