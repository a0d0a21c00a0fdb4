"""The generated streets: placement of objects, and rendering of a picture."""

from dataclasses import dataclass
from functools import partial

import numpy as np

from dataset.mini import things as draw
from dataset.mini.scene import ID, Camera, Canvas, Plane, Scene
from dataset.mini.textures import (
    Color,
    asphalt,
    bgr,
    bricks,
    cloudy,
    color,
    facade,
    fraction,
    gradient,
    grass,
    leaves,
    mostly,
    paving,
    slabs,
    stripes,
)

_FAR = 75.0  # meters; distance of the end of a street


@dataclass(frozen=True)
class City:
    """Properties shared by the pictures of a city: camera, ego vehicle, season, and rail tracks."""

    focal: float
    height: float
    horizon: float
    balance: np.ndarray  # gains of B, G, R
    hood: float  # height of the hood of the ego vehicle in the frame; 0 if not visible
    border: float  # width of the empty strip that rectification leaves
    green: float  # hue of the foliage
    tracks: float  # probability of rail tracks in a street

    @staticmethod
    def draw(rng: np.random.Generator) -> "City":
        """Draw a random city."""
        return City(
            focal=rng.uniform(0.95, 1.3),
            height=rng.uniform(1.3, 2.2),
            horizon=rng.uniform(0.42, 0.56),
            balance=rng.uniform(0.92, 1.08, 3),
            hood=rng.uniform(0.03, 0.09) * (rng.random() < 0.7),
            border=rng.uniform(0.004, 0.012),
            green=rng.uniform(0.22, 0.34),
            tracks=rng.uniform(0.1, 0.4),
        )


@dataclass(frozen=True)
class Street:
    """The plan of a street: half the width of the roadway, and the strips on each side (-1 and 1)."""

    half: float
    strips: dict[int, list[tuple[str, float]]]  # kind of ground and width in meters, from the curb outwards

    @staticmethod
    def draw(rng: np.random.Generator, city: City) -> "Street":
        """Draw a random street."""
        strips = {}
        for side in (-1, 1):
            row = [("sidewalk", rng.uniform(2.0, 4.5))]
            if rng.random() < 0.7:
                row.insert(rng.integers(0, 2), ("terrain", rng.uniform(2.0, 5.0)))
            if rng.random() < 0.15:
                row.insert(0, ("parking", 2.4))
            elif rng.random() < city.tracks:
                row.insert(0, ("rail track", 2.8))
            strips[side] = row
        return Street(rng.uniform(2.2, 4.5), strips)

    def frontage(self, side: int) -> float:
        """Return the distance from the road center to the outer edge of the strips of a side."""
        return self.half + sum(width for _, width in self.strips[side])

    def middle_of(self, side: int, kind: str) -> float | None:
        """Return the distance from the road center to the center of a strip of this kind, or None."""
        edge = self.half
        for name, width in self.strips[side]:
            if name == kind:
                return edge + width / 2
            edge += width
        return None


#: Clear, overcast and dusk skies: share of pictures, then ranges of hue, saturation and value at the zenith
#: and above the horizon.
_SKIES = (
    (0.50, ((0.55, 0.63), (0.3, 0.7), (0.6, 0.95)), ((0.52, 0.6), (0.02, 0.2), (0.8, 1.0))),
    (0.38, ((0.5, 0.7), (0.0, 0.12), (0.5, 0.9)), ((0.5, 0.7), (0.0, 0.1), (0.6, 0.95))),
    (0.12, ((0.6, 0.75), (0.1, 0.5), (0.35, 0.7)), ((0.02, 0.12), (0.2, 0.6), (0.7, 1.0))),
)


def _sky(scene: Scene, rng) -> None:
    _, *ranges = _SKIES[rng.choice(len(_SKIES), p=[sky[0] for sky in _SKIES])]
    zenith, low = (color(rng, *each) for each in ranges)
    surface, horizon = cloudy(rng, zenith, low, rng.uniform(0.2, 0.7)), scene.camera.horizon
    scene.haze = low * 0.9
    scene.canvas.fill(
        [[(0, 0), (2, 0), (2, horizon + 0.02), (0, horizon + 0.02)]],
        lambda x, y: surface(x, (horizon - y) / horizon),
        ID["sky"],
    )


def _ground(scene: Scene, rng, street: Street, earth: Color) -> None:
    """Draw the ground: the roadway with its markings, and the strips next to it."""
    camera, canvas = scene.camera, scene.canvas
    first = int(np.searchsorted(canvas.y[:, 0], camera.horizon + 0.004))
    y = canvas.y[first:]
    z = np.minimum(camera.focal * camera.height / (y - camera.horizon), 400.0).astype(np.float32)
    offset = (canvas.x - 1) * z / np.float32(camera.focal) - camera.middle(z).astype(np.float32)
    gray = color(rng, (0, 1), (0, 0.1), (0.28, 0.5))
    surfaces = {
        "road": asphalt(rng, gray),
        "parking": asphalt(rng, gray * rng.uniform(0.75, 1.25)),
        "rail track": slabs(rng, color(rng, (0.04, 0.1), (0.2, 0.4), (0.25, 0.45))),
        "sidewalk": paving(rng, color(rng, (0.0, 0.12), (0.05, 0.28), (0.5, 0.85))),
        "terrain": grass(rng, earth),
    }
    image, labels = canvas.image[:, first:], canvas.labels[first:]

    def lay(kind: str, where: np.ndarray) -> None:
        rows, columns = (np.flatnonzero(where.any(axis)) for axis in (1, 0))
        if rows.size:  # compute only the window that the surface covers
            window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
            values = surfaces[kind](offset[window], z[window[0]])
            np.copyto(image[(slice(None), *window)], scene.veiled(values, z[window[0]]), where=where[window])
            labels[where] = ID[kind]

    def mark(where: np.ndarray, paint: Color) -> None:
        np.copyto(image, scene.veiled(paint, z), where=where)

    across = np.abs(offset)
    lay("road", across < street.half)
    for side in (-1, 1):
        distance, edge = offset * side, street.half
        for kind, width in street.strips[side]:
            lay(kind, (distance >= edge) & (distance < edge + width))
            if kind == "sidewalk":
                mark(
                    (distance >= edge) & (distance < edge + 0.22), color(rng, (0, 1), (0, 0.05), (0.6, 0.85))
                )
            if kind == "rail track":
                for rail in (0.65, width - 0.65):
                    mark(np.abs(distance - edge - rail) < 0.09, bgr(70, 75, 80))
            edge += width
        lay("terrain" if rng.random() < 0.75 else "sidewalk", distance >= edge)
    white = bgr(225, 230, 230) if rng.random() < 0.85 else bgr(60, 190, 230)
    worn = rng.uniform(0.75, 1.0) * white
    period, share = rng.uniform(4, 9), rng.uniform(0.35, 0.7)
    mark((across < 0.12) & (fraction(z / period) < share), worn)
    if rng.random() < 0.6:
        mark((across > street.half - 0.45) & (across < street.half - 0.25), worn)
    if rng.random() < 0.5:
        crossing = rng.uniform(5, 16)
        mark(
            (across < street.half - 0.3) & (fraction(offset) < 0.5) & (z > crossing) & (z < crossing + 3),
            worn,
        )
    canvas.instances[first:] = labels


def _foliage(rng, city: City):
    hue = city.green + rng.uniform(-0.06, 0.06)
    return leaves(rng, color(rng, (hue, hue), (0.35, 0.75), (0.3, 0.65)), rng.uniform(0.7, 1.3))


def _backdrop(scene: Scene, rng, city: City, x: float, z: float, run: tuple[float, float], side: int) -> None:
    """Draw the background behind walls, fences and open ground: a building, trees, or nothing."""
    away = x + side * rng.uniform(3, 9)
    choice = rng.random()
    if choice < 0.3:
        draw.block(scene, rng, away, z, run, side, 8.0)
    elif choice < 0.75:
        for _ in range(2):
            along = rng.uniform(0, 1)
            place = scene.upright(away + run[0] * along, z + run[1] * along)
            draw.tree(place, rng, _foliage(rng, city), rng.uniform(4, 10))


def _frontage(scene: Scene, rng, city: City, side: int, edge: float, earth: Color) -> None:
    """Draw the row of objects along one side of the street, from its end towards the camera."""
    camera, z = scene.camera, _FAR
    kinds, weights = ("building", "wall", "fence", "hedge", "open"), (0.24, 0.26, 0.26, 0.12, 0.12)
    while z > 1.5:
        near = max(z - rng.uniform(5, 13), 1.0)
        x = camera.middle(near) + side * edge
        run = (camera.middle(z) + side * edge - x, z - near)
        length = float(np.hypot(*run))
        plane, kind = Plane(scene, x, near, *run), rng.choice(kinds, p=weights)
        if kind == "building":
            draw.block(scene, rng, x, near, run, side, rng.uniform(6, 12))
        else:
            _backdrop(scene, rng, city, x, near, run, side)
        if kind == "wall":
            tall = rng.uniform(2.2, 6.0)
            if rng.random() < 0.65:
                surface = bricks(rng, base := mostly(rng, (-0.02, 0.05), (0.4, 0.7), (0.4, 0.7)))
            else:
                surface = slabs(rng, base := mostly(rng, (0.1, 0.6), (0, 0.12), (0.45, 0.75)))
            for face in (scene.upright(x, near, mirrored=side < 0), plane):
                face.rectangle(0, 0, 0.5 if face is not plane else length, tall, surface, ID["wall"])
            plane.rectangle(0, tall - 0.15, length, tall + 0.1, base * 0.6, ID["wall"])
        elif kind == "fence":
            draw.fence(plane, rng, length, rng.uniform(2.0, 4.0))
        elif kind == "hedge":
            draw.hedge(plane, rng, _foliage(rng, city), length, rng.uniform(1.2, 3.5))
        elif kind == "open" and rng.random() < 0.7:
            crest = [
                (0, rng.uniform(0.8, 3)),
                (length / 2, rng.uniform(1, 3.5)),
                (length, rng.uniform(0.5, 2)),
            ]
            plane.polygon([(0, 0), *crest, (length, 0)], grass(rng, earth), ID["terrain"])
        z = near


def _street_end(scene: Scene, rng, city: City, street: Street) -> None:
    """Draw the end of the street: a skyline, and on some streets a bridge, with or without a tunnel."""
    camera = scene.camera
    for _ in range(6):
        far = scene.upright(rng.uniform(-110, 80), 95)
        if rng.random() < 0.5:
            forest = leaves(rng, color(rng, (0.15, 0.4), (0.1, 0.5), (0.3, 0.6)), 3.0)
            draw.hedge(far, rng, forest, 40, rng.uniform(3, 16))
        else:
            base = color(rng, (0, 1), (0, 0.3), (0.3, 0.8))
            wide, tall = rng.uniform(15, 40), rng.uniform(8, 26)
            far.rectangle(0, 0, wide, tall, facade(rng, base, 3.2), ID["building"])
    if rng.random() < 0.3:
        x = camera.middle(_FAR) - 14
        draw.block(scene, rng, x, _FAR, (28.0, 0.1), 1, 28.0)
    if rng.random() < 0.15:
        z = rng.uniform(25, 50)
        plane = scene.upright(camera.middle(z) - 40, z)
        if rng.random() < 0.4:
            plane.rectangle(40 - street.half, 0, 40 + street.half, 5, bgr(30, 30, 32), ID["tunnel"])
        plane.rectangle(0, 4.6, 80, 6.4, slabs(rng, color(rng, (0, 1), (0, 0.2), (0.4, 0.7))), ID["bridge"])


def _traffic(scene: Scene, rng, city: City, street: Street) -> list:
    """Return the vehicles and two-wheelers on the roadway, as (distance, drawing function)."""
    things = []

    def put(kind, offset, z, along):
        things.append((z, lambda: draw.vehicle(scene, kind, offset, z, along)))

    for kind in ("truck", "bus", "train"):
        if rng.random() < 0.6:
            side, along = int(rng.choice((-1, 1))), rng.random() < 0.5
            tracks = street.middle_of(side, "rail track")
            offset = side * (tracks if kind == "train" and tracks else street.half * rng.uniform(0.3, 0.8))
            if along:
                put(kind, offset, rng.uniform(6, 13), along)
            else:
                put(kind, rng.uniform(-9, 9), rng.uniform(9, 19), along)
    for _ in range(rng.integers(3, 7)):
        along = rng.random() < 0.75
        offset = rng.choice((-1, 1)) * street.half * rng.uniform(0.35, 1.05)
        put("car", offset if along else rng.uniform(-6, 6), rng.uniform(4.5, 24), along)
    if rng.random() < 0.2:
        kind, offset = str(rng.choice(("caravan", "trailer"))), rng.choice((-1, 1)) * street.half
        put(kind, offset, rng.uniform(8, 18), rng.random() < 0.6)

    def cyclist(motor: bool, ridden: bool, offset: float, z: float) -> None:
        label = "motorcycle" if motor else "bicycle"
        x = scene.camera.middle(z) + offset
        scene.shadow(x - 0.8, x + 0.8, z, 0.5)
        machine = scene.instance(ID[label])
        turn = rng.uniform(-0.6, 0.6)
        plane = Plane(scene, x, z, float(rng.choice((-1, 1))) * np.cos(turn), np.sin(turn))
        saddle, bars, pedal = (draw.motorcycle if motor else draw.bicycle)(plane, rng, machine)
        if ridden:
            draw.rider(plane, rng, saddle, bars, pedal, scene.instance(ID["rider"]))

    for motor in (False, True):
        for _ in range(rng.integers(1, 4)):
            ridden = rng.random() < 0.6
            reach = street.half if ridden else street.half + 2.5
            offset, z = rng.uniform(-reach, reach), rng.uniform(3.6, 10)
            things.append((z, partial(cyclist, motor, ridden, offset, z)))
    return things


def _sidewalk(scene: Scene, rng, city: City, street: Street) -> list:
    """Return people and street furniture next to or on the roadway, as (distance, drawing function)."""
    things, middle = [], scene.camera.middle

    def stand(z, offset, paint):
        things.append((z, lambda: paint(scene.upright(middle(z) + offset, z))))

    def beside(low=0.3, high=2.6):
        return rng.choice((-1, 1)) * (street.half + rng.uniform(low, high))

    def walker(plane):
        scene.shadow(plane.x - 0.35, plane.x + 0.35, plane.z, 0.4)
        draw.person(plane, rng, ID["person"], scene.instance(ID["person"]))

    def crowd(plane):  # too far away to separate, so it is one region without instances, as in Cityscapes
        for s in range(4):
            draw.person(scene.upright(plane.x + 0.6 * s, plane.z), rng, ID["person"], ID["person"])

    def lights(plane):
        tall = rng.uniform(3.2, 5.5)
        draw.pole(plane, rng, tall)
        draw.traffic_light(plane, rng, 0.0, tall - 1.2)
        if rng.random() < 0.5:
            draw.traffic_light(plane, rng, float(rng.choice((-1, 1))) * 0.55, 1.9)

    def sign(plane):
        tall = rng.uniform(2.2, 3.6)
        draw.pole(plane, rng, tall)
        for i in range(rng.integers(1, 3)):
            draw.traffic_sign(plane, rng, 0.0, tall - 0.5 - 1.15 * i)

    def polegroup(plane):
        for s in (0.0, 0.35, 0.7):
            draw.pole(scene.upright(plane.x + s, plane.z), rng, 4.5, ID["polegroup"])

    for _ in range(rng.integers(3, 8)):
        stand(
            rng.uniform(3.6, 14),
            beside() if rng.random() < 0.75 else rng.uniform(-1, 1) * street.half,
            walker,
        )
    for _ in range(rng.integers(0, 4)):
        foliage, tall = _foliage(rng, city), rng.uniform(3.5, 8)
        stand(rng.uniform(6, 22), beside(0.8, 4), lambda p, f=foliage, h=tall: draw.tree(p, rng, f, h))
    if rng.random() < 0.3:
        stand(rng.uniform(22, 32), beside(), crowd)
    for paint, most in ((lights, 6), (sign, 5), (lambda p: draw.pole(p, rng, rng.uniform(4.5, 8)), 3)):
        for _ in range(rng.integers(1, most)):
            stand(rng.uniform(4.5, 18), beside(0.3, 1.2), paint)
    if rng.random() < 0.12:
        stand(rng.uniform(8, 18), beside(), polegroup)
    for name in ("static", "static", "dynamic"):
        if rng.random() < 0.4:
            stand(rng.uniform(5, 15), beside(0.8, 3), lambda p, n=name: draw.clutter(p, rng, ID[n]))
    if rng.random() < 0.15:
        side, z = int(rng.choice((-1, 1))), rng.uniform(6, 12)
        x, run = middle(z) + side * (street.half + 0.2), (middle(z + 12) - middle(z), 12.0)
        steel = stripes(
            bgr(170, 170, 170),
            bgr(110, 110, 110),
            0.2,
            0.5,
            upright=False,
        )
        things.append(
            (z, lambda: Plane(scene, x, z, *run).rectangle(0, 0.3, 12, 0.8, steel, ID["guard rail"]))
        )
    if rng.random() < 0.15:
        z = rng.uniform(8, 16)
        island = [(-0.8, 0.0), (0.8, 0.0), (0.8, 0.25), (-0.8, 0.25)]
        stand(z, 0.0, lambda p: p.polygon(island, bgr(150, 155, 160), ID["ground"]))
    return things


def _camera_car(scene: Scene, rng, city: City) -> None:
    """Draw the hood under the camera, and the empty strips that rectification leaves at the edges."""
    canvas = scene.canvas
    if city.hood:
        arc = np.linspace(0.0, 2.0, 25)
        edge = [(x, 1 - city.hood * (1 - 0.55 * (x - 1) ** 2)) for x in arc]
        sheen = gradient(color(rng, (0, 1), (0, 0.1), (0.1, 0.6)), 1.0)
        canvas.fill([[*edge, (2, 1.1), (0, 1.1)]], lambda x, y: sheen(x, (1 - y) * 8), ID["ego vehicle"])
    black, border = bgr(6, 6, 6), city.border
    for left in (0, 2 - border):
        canvas.fill(
            [[(left, 0), (left + border, 0), (left + border, 1), (left, 1)]],
            black,
            ID["rectification border"],
        )
    canvas.fill([[(0, 0), (2, 0), (2, border), (0, border)]], None, ID["out of roi"])


def _developed(image: np.ndarray, rng, balance: np.ndarray) -> np.ndarray:
    """Simulate the camera: exposure, white balance, tone curve and grain.

    Args:
        image: float32 [3, h, w].
        rng: random generator.
        balance: gains of B, G, R.

    Returns:
        uint8 [h, w, 3].
    """
    gain = rng.uniform(0.75, 1.2) * balance * rng.uniform(0.95, 1.05, 3)
    power = rng.uniform(0.8, 1.25)
    steps = np.arange(256 * 8) / (255 * 8)
    curve = (np.clip(steps, 0, 1) ** power * 255).astype(np.float32)
    grain = (rng.random((256, 256), dtype=np.float32) - 0.5) * np.float32(rng.uniform(2, 12))
    rows, columns = (np.arange(n) % 256 for n in image.shape[1:])
    exposed = np.clip(image * (gain * 8).astype(np.float32).reshape(3, 1, 1), 0, 255 * 8).astype(np.int32)
    developed = np.clip(curve[exposed] + grain[rows][:, columns] + np.float32(0.5), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(developed.transpose(1, 2, 0))


def render(
    size: tuple[int, int], rng: np.random.Generator, city: City | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw one scene.

    Args:
        size: (height, width) of the picture.
        rng: random generator; the scene is the same for every size.
        city: properties shared with other pictures; None draws them from `rng`.

    Returns:
        Image uint8 [h, w, 3] BGR, label ids uint8 [h, w], and instance ids uint16 [h, w].
    """
    height, width = size
    # Small pictures are drawn at twice the size, in order to smooth edges and textures.
    fine = 2 if height <= 512 else 1
    city = city or City.draw(rng)
    camera = Camera(
        focal=city.focal * rng.uniform(0.92, 1.08),
        horizon=city.horizon + rng.uniform(-0.07, 0.07),
        height=city.height * rng.uniform(0.85, 1.15),
        start=rng.uniform(-3.0, 3.0),
        slope=rng.uniform(-0.15, 0.15),
        bend=rng.uniform(-0.006, 0.006),
    )
    scene = Scene(Canvas(fine * height, fine * width), camera, rng, bgr(200, 200, 200), rng.uniform(60, 300))
    street = Street.draw(rng, city)
    earth = color(rng, (0.1, 0.22), (0.35, 0.65), (0.45, 0.75))
    _sky(scene, rng)
    _ground(scene, rng, street, earth)
    _street_end(scene, rng, city, street)
    for side in (-1, 1):
        _frontage(scene, rng, city, side, street.frontage(side), earth)
    things = _traffic(scene, rng, city, street) + _sidewalk(scene, rng, city, street)
    for _, paint in sorted(things, key=lambda thing: -thing[0]):
        paint()
    _camera_car(scene, rng, city)
    canvas = scene.canvas
    shifted = [canvas.image[:, row::fine, column::fine] for row in range(fine) for column in range(fine)]
    image = sum(shifted[1:], start=shifted[0]) / np.float32(fine * fine)
    return (
        _developed(image, rng, city.balance),
        canvas.labels[::fine, ::fine].copy(),
        canvas.instances[::fine, ::fine].copy(),
    )
