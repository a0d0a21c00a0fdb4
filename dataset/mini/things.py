"""Objects of the generated street scenes, drawn on vertical planes of a scene."""

import math
from dataclasses import dataclass

import numpy as np

from dataset.mini.scene import ID, Plane, Scene, circle
from dataset.mini.textures import Color, Material, anything, bgr, color, facade, gradient, mostly, stripes

_BLACK = bgr(22, 22, 24)
_WHITE = bgr(235, 235, 235)


def _glass(rng) -> Color:
    return color(rng, (0.5, 0.65), (0.05, 0.35), (0.1, 0.3) if rng.random() < 0.75 else (0.6, 0.9))


# People and two-wheelers. They are drawn around s = 0, with feet or wheels at t = 0.


def person(plane: Plane, rng, label: int, instance: int | None) -> None:
    """Draw a standing or walking person, about 1.75 m tall."""
    tall, stride = rng.uniform(1.55, 1.95), rng.uniform(0.03, 0.3)
    coat, trousers, skin = (
        anything(rng),
        anything(rng) * 0.7,
        color(rng, (0.03, 0.08), (0.3, 0.6), (0.35, 0.9)),
    )
    hip, shoulder, half = 0.5 * tall, 0.82 * tall, rng.uniform(0.22, 0.3)
    for foot in (-stride, stride):
        plane.stroke((foot * 0.25, hip), (foot, 0.0), 0.2, trousers, label, instance)
        plane.rectangle(foot - 0.12, 0, foot + 0.12, 0.08, _BLACK, label, instance)
    low = hip * (0.65 if rng.random() < 0.3 else 0.95)  # a long coat, or a jacket
    torso = [(-half * 0.85, low), (half * 0.85, low), (half, shoulder), (half * 0.5, shoulder + 0.07)]
    plane.polygon(
        [*torso, (-half * 0.5, shoulder + 0.07), (-half, shoulder)], gradient(coat, tall), label, instance
    )
    for side in (-1, 1):
        hand = (side * (half + 0.06 + stride * 0.3), hip * 0.97)
        plane.stroke((side * half * 0.9, shoulder - 0.02), hand, 0.13, coat * 0.8, label, instance)
    plane.disc(0, 0.925 * tall, 0.075 * tall, skin, label, instance)
    plane.polygon(circle(0, 0.955 * tall, 0.068 * tall), anything(rng) * 0.5, label, instance)


def rider(
    plane: Plane, rng, saddle: float, bars: tuple[float, float], pedal: tuple[float, float], instance
) -> None:
    """Draw a rider with a helmet, on a saddle at s = 0, with hands on the handlebars."""
    label = ID["rider"]
    coat = mostly(rng, (0.08, 0.2), (0.7, 1), (0.75, 1), 0.6)  # often high-visibility clothes
    trousers, helmet = anything(rng) * 0.7, anything(rng)
    skin = color(rng, (0.03, 0.08), (0.3, 0.6), (0.35, 0.9))
    shoulder = (bars[0] * rng.uniform(0.35, 0.6), saddle + 0.55)
    knee = ((pedal[0] + 0.25), (saddle + pedal[1]) / 2 + 0.08)
    plane.stroke((0, saddle), knee, 0.22, trousers, label, instance)
    plane.stroke(knee, pedal, 0.17, trousers, label, instance)
    plane.stroke((0.0, saddle - 0.08), shoulder, 0.42, gradient(coat, 1.8), label, instance)
    plane.stroke(shoulder, bars, 0.14, coat * 0.8, label, instance)
    head = (shoulder[0] + 0.1, shoulder[1] + 0.25)
    plane.disc(*head, 0.14, skin, label, instance)
    plane.polygon(circle(head[0], head[1] + 0.05, 0.145), helmet, label, instance)


def bicycle(plane: Plane, rng, instance: int | None) -> tuple[float, tuple, tuple]:
    """Draw a bicycle with its saddle at s = 0; return saddle height, handlebars and pedal for the rider."""
    label, radius = ID["bicycle"], rng.uniform(0.34, 0.4)
    back, front = -0.42, 0.68
    frame, tire = anything(rng), _BLACK if rng.random() < 0.7 else color(rng, (0, 1), (0, 0.3), (0.3, 0.7))
    saddle, bars, pedal = (0.0, 0.95), (0.52, 1.05), (0.08, 0.3)
    hull = [(back, 0.3), (front, 0.3), (front - 0.1, 0.85), (saddle[0], 0.85)]
    # The label includes the gaps in the frame and between spokes, as in Cityscapes.
    plane.polygon(hull, None, label, instance)
    for s in (back, front):
        plane.disc(s, radius, radius, None, label, instance)
        for angle in range(6):
            ds, dt = radius * math.cos(angle * math.pi / 6), radius * math.sin(angle * math.pi / 6)
            plane.stroke((s - ds, radius - dt), (s + ds, radius + dt), 0.022, _WHITE * 0.7, label, instance)
        plane.disc(s, radius, radius, tire, label, instance, hole=radius - 0.075)
    tubes = [
        ((back, radius), (0.0, 0.82)),
        ((0.0, 0.82), pedal),
        (pedal, (back, radius)),
        (pedal, (0.48, 0.8)),
    ]
    tubes += [((0.0, 0.8), (0.48, 0.82)), ((front, radius), (0.48, 0.95)), ((0.45, 0.98), (0.6, 1.08))]
    for start, end in tubes:
        plane.stroke(start, end, 0.075, frame, label, instance)
    plane.stroke((-0.14, saddle[1]), (0.14, saddle[1]), 0.09, _BLACK, label, instance)
    return saddle[1], bars, pedal


def motorcycle(plane: Plane, rng, instance: int | None) -> tuple[float, tuple, tuple]:
    """Draw a motorcycle with its saddle at s = 0; return saddle height, handlebars and footrest."""
    label, lacquer = ID["motorcycle"], anything(rng)
    chrome = bgr(190, 190, 190)
    for s in (-0.65, 0.8):
        plane.disc(s, 0.33, 0.33, _BLACK, label, instance)
        plane.disc(s, 0.33, 0.15, chrome * rng.uniform(0.5, 1), label, instance)
    plane.polygon([(-0.5, 0.28), (0.5, 0.25), (0.6, 0.6), (-0.3, 0.62)], _BLACK * 2.2, label, instance)
    plane.stroke((-1.0, 0.3), (0.1, 0.27), 0.12, chrome, label, instance)  # exhaust
    plane.stroke((0.8, 0.33), (0.5, 1.05), 0.12, chrome, label, instance)
    body = [
        (-0.95, 0.72),
        (-0.2, 0.6),
        (0.15, 0.5),
        (0.75, 0.55),
        (0.72, 0.95),
        (0.3, 0.98),
        (0.1, 0.82),
        (-0.9, 0.88),
    ]
    plane.polygon(body, gradient(lacquer, 1.0), label, instance)
    plane.polygon([(-0.75, 0.84), (0.12, 0.8), (0.1, 0.92), (-0.75, 0.96)], _BLACK, label, instance)
    plane.disc(0.76, 0.86, 0.11, bgr(200, 245, 255), label, instance)
    plane.stroke((0.4, 1.1), (0.62, 1.02), 0.08, _BLACK, label, instance)
    return 0.9, (0.5, 1.1), (0.05, 0.3)


# Vehicles. A side view is drawn from s = 0 (the back) to the length, a back view from s = 0 to the width.


def _wheel(plane: Plane, s: float, radius: float, label, instance) -> None:
    plane.disc(s, radius, radius, _BLACK, label, instance)
    plane.disc(s, radius, radius * 0.5, bgr(150, 150, 150), label, instance)


@dataclass(frozen=True)
class Look:
    """Properties shared by the views of one vehicle."""

    label: int
    length: float
    width: float
    height: float
    lacquer: Color
    second: Color
    glass: Color
    style: float  # 0..1, selects a variant

    @staticmethod
    def draw(rng, kind: str) -> "Look":
        """Draw the properties of a vehicle of this kind."""
        length, width, height = {
            "car": (rng.uniform(3.8, 4.7), 1.8, rng.uniform(1.4, 1.8)),
            "truck": (rng.uniform(7, 10), 2.5, rng.uniform(3.0, 3.9)),
            "bus": (rng.uniform(9, 13), 2.5, rng.uniform(2.9, 3.5)),
            "train": (rng.uniform(16, 30), 2.6, rng.uniform(3.4, 4.0)),
            "caravan": (5.0, 2.2, 2.5),
            "trailer": (4.5, 2.2, 2.4),
        }[kind]
        usual = {  # typical hue, saturation and value of the paint and the second color
            "truck": (((0, 1), (0.0, 0.9), (0.5, 0.9)), ((0.55, 0.66), (0.2, 0.7), (0.45, 0.85))),
            "bus": (((0.02, 0.15), (0.6, 0.9), (0.7, 0.95)), ((0, 1), (0, 0.2), (0.1, 0.9))),
            "train": (((0.55, 0.65), (0, 0.1), (0.7, 0.95)), ((0.9, 1.0), (0.6, 0.9), (0.4, 0.8))),
        }.get(kind)
        lacquer, second = (mostly(rng, *each) for each in usual) if usual else (anything(rng), anything(rng))
        return Look(ID[kind], length, width, height, lacquer, second, _glass(rng), rng.random())


def car_side(plane: Plane, look: Look, instance) -> None:
    """Draw the side of a car."""
    n, h = look.length, look.height
    hood = 0.58 * h
    tail = (0.95 if look.style < 0.5 else 0.6) * h  # station wagon or sedan
    outline = [
        (0, 0.28),
        (0, hood),
        (0.06 * n, tail),
        (0.25 * n, h),
        (0.6 * n, h),
        (0.76 * n, hood * 1.05),
    ]
    plane.polygon(
        [*outline, (0.98 * n, hood * 0.85), (n, 0.28)], gradient(look.lacquer, h), look.label, instance
    )
    sill = hood * 1.06
    windows = [
        (0.13 * n, sill),
        (0.16 * n, 0.9 * tail),
        (0.27 * n, 0.93 * h),
        (0.43 * n, 0.93 * h),
        (0.43 * n, sill),
    ]
    plane.polygon(windows, look.glass, look.label, instance)
    plane.polygon(
        [(0.46 * n, sill), (0.46 * n, 0.93 * h), (0.58 * n, 0.93 * h), (0.71 * n, sill)],
        look.glass,
        look.label,
        instance,
    )
    plane.rectangle(0, 0.45, 0.04 * n, 0.65, bgr(40, 40, 220), look.label, instance)
    plane.rectangle(0.95 * n, 0.42, n, 0.6, bgr(210, 245, 250), look.label, instance)
    for s in (0.2 * n, 0.8 * n):
        _wheel(plane, s, 0.34, look.label, instance)


def car_back(plane: Plane, look: Look, instance) -> None:
    """Draw the back of a car."""
    w, h = look.width, look.height
    for s in (0.04 * w, 0.78 * w):
        plane.rectangle(s, 0, s + 0.18 * w, 0.4, _BLACK, look.label, instance)
    sill = 0.58 * h
    outline = [
        (0, 0.25),
        (0.0, sill),
        (0.14 * w, 0.97 * h),
        (0.22 * w, h),
        (0.78 * w, h),
        (0.86 * w, 0.97 * h),
    ]
    plane.polygon([*outline, (w, sill), (w, 0.25)], gradient(look.lacquer, h), look.label, instance)
    plane.polygon(
        [(0.1 * w, sill * 1.06), (0.2 * w, 0.93 * h), (0.8 * w, 0.93 * h), (0.9 * w, sill * 1.06)],
        look.glass,
        look.label,
        instance,
    )
    lamps = (
        [40, 40, 215] if look.style < 0.65 else [215, 245, 250]
    )  # rear lights, or headlights of oncoming cars
    for s in (0.02 * w, 0.8 * w):
        plane.rectangle(s, 0.4 * h, s + 0.18 * w, 0.54 * h, bgr(*lamps), look.label, instance)
    plane.rectangle(0.34 * w, 0.36 * h, 0.66 * w, 0.46 * h, _WHITE * 0.9, look.label, instance)
    plane.rectangle(0.0, 0.2, w, 0.25 * h, _BLACK * 2, look.label, instance)


def _ribs(look: Look) -> Material:
    """Return the material of cargo walls, with vertical ribs."""
    return stripes(look.second, np.clip(look.second * 0.55 + 8, 0, 255), 0.5, 0.45, upright=True)


def truck_side(plane: Plane, look: Look, instance) -> None:
    """Draw the side of a truck."""
    n, h, label = look.length, look.height, look.label
    cab = n - 2.0
    plane.rectangle(0.2, 0.5, n - 0.3, 0.95, _BLACK * 2, label, instance)  # chassis
    plane.rectangle(0, 0.9, cab - 0.25, h, _ribs(look), label, instance)
    outline = [(cab, 0.45), (cab, 0.86 * h), (n - 0.5, 0.86 * h), (n, 0.5 * h), (n, 0.45)]
    plane.polygon(outline, gradient(look.lacquer, h), label, instance)
    plane.polygon(
        [(cab + 0.5, 0.52 * h), (cab + 0.5, 0.78 * h), (n - 0.6, 0.78 * h), (n - 0.2, 0.52 * h)],
        look.glass,
        label,
        instance,
    )
    for s in (0.14 * n, 0.14 * n + 1.15, n - 1.0):
        _wheel(plane, s, 0.52, label, instance)


def truck_back(plane: Plane, look: Look, instance) -> None:
    """Draw the back of a truck."""
    w, h, label = look.width, look.height, look.label
    for s in (0.05 * w, 0.72 * w):
        plane.rectangle(s, 0, s + 0.23 * w, 0.8, _BLACK, label, instance)
    plane.rectangle(0, 0.55, w, 0.9, _BLACK * 2, label, instance)
    plane.rectangle(0, 0.9, w, h, _ribs(look), label, instance)
    plane.rectangle(0.48 * w, 0.9, 0.52 * w, h, _BLACK * 2, label, instance)
    for s in (0, 0.85 * w):
        plane.rectangle(s, 0.62, s + 0.15 * w, 0.82, bgr(40, 40, 215), label, instance)


def bus_side(plane: Plane, look: Look, instance) -> None:
    """Draw the side of a bus."""
    n, h, label = look.length, look.height, look.label
    outline = [(0, 0.35), (0, h - 0.15), (0.15, h), (n - 0.3, h), (n, h - 0.4), (n, 0.35)]
    plane.polygon(outline, gradient(look.lacquer, h), label, instance)
    plane.rectangle(0, 0.35, n, 0.75, look.second, label, instance)
    panes = round(n / 1.5)
    for i in range(panes):  # a row of large windows; every third one is a door
        s = 0.2 + i * (n - 0.4) / panes
        low = 0.45 if i % 3 == 2 else 0.45 * h
        plane.rectangle(s + 0.1, low, s + (n - 0.4) / panes - 0.1, 0.84 * h, look.glass, label, instance)
    for s in (0.22 * n, 0.78 * n):
        _wheel(plane, s, 0.5, label, instance)


def bus_back(plane: Plane, look: Look, instance) -> None:
    """Draw the back of a bus."""
    w, h, label = look.width, look.height, look.label
    for s in (0.05 * w, 0.77 * w):
        plane.rectangle(s, 0, s + 0.18 * w, 0.6, _BLACK, label, instance)
    outline = [(0, 0.3), (0, h - 0.25), (0.12 * w, h), (0.88 * w, h), (w, h - 0.25), (w, 0.3)]
    plane.polygon(outline, gradient(look.lacquer, h), label, instance)
    plane.rectangle(0.07 * w, 0.45 * h, 0.93 * w, 0.82 * h, look.glass, label, instance)
    plane.rectangle(0.3 * w, 0.86 * h, 0.7 * w, 0.95 * h, bgr(60, 190, 250), label, instance)
    plane.rectangle(0, 0.3, w, 0.75, look.second, label, instance)
    for s in (0, 0.84 * w):
        plane.rectangle(s, 0.28 * h, s + 0.16 * w, 0.36 * h, bgr(40, 40, 215), label, instance)


def _boards(look: Look) -> Material:
    """Return the material of railcar walls, with horizontal stripes."""
    return stripes(look.lacquer, np.clip(look.second, 0, 255), 0.55, 0.45, upright=False)


def train_side(plane: Plane, look: Look, instance) -> None:
    """Draw the side of a railcar."""
    n, h, label = look.length, look.height, look.label
    nose = 1.3
    outline = [(0, 0.2), (0, 0.9 * h), (0.3, h), (n - nose, h), (n - 0.2, 0.5 * h), (n, 0.2)]
    plane.polygon(outline, _boards(look), label, instance)
    bays = round(n / 1.9)
    for i in range(bays):
        s = 0.3 + i * (n - 0.3 - nose) / bays
        plane.rectangle(
            s + 0.25, 0.55 * h, s + (n - 0.3 - nose) / bays - 0.25, 0.8 * h, look.glass, label, instance
        )
    plane.rectangle(0.3, 0.92 * h, n - nose, h, _BLACK * 2.5, label, instance)
    plane.rectangle(0.3, 0.05, n - 0.3, 0.35, _BLACK * 1.6, label, instance)


def train_back(plane: Plane, look: Look, instance) -> None:
    """Draw the back of a railcar."""
    w, h, label = look.width, look.height, look.label
    outline = [
        (0.08 * w, 0.1),
        (0, 0.45 * h),
        (0.12 * w, 0.9 * h),
        (0.3 * w, h),
        (0.7 * w, h),
        (0.88 * w, 0.9 * h),
    ]
    plane.polygon([*outline, (w, 0.45 * h), (0.92 * w, 0.1)], _boards(look), label, instance)
    plane.polygon(
        [(0.1 * w, 0.5 * h), (0.18 * w, 0.86 * h), (0.82 * w, 0.86 * h), (0.9 * w, 0.5 * h)],
        look.glass,
        label,
        instance,
    )
    for s in (0.18 * w, 0.82 * w):
        plane.disc(s, 0.32 * h, 0.17, bgr(205, 245, 250), label, instance)
    plane.rectangle(0.08 * w, 0.05, 0.92 * w, 0.4, _BLACK * 1.6, label, instance)


def box_side(plane: Plane, look: Look, instance) -> None:
    """Draw the side of a caravan (with windows) or a trailer (with a tarpaulin)."""
    n, h, label = look.length, look.height, look.label
    plane.polygon(
        [(0, 0.45), (0.1, h), (n - 0.5, h), (n, 0.6 * h), (n - 0.2, 0.45)],
        gradient(look.lacquer, h),
        label,
        instance,
    )
    if label == ID["caravan"]:
        plane.rectangle(0.15 * n, 0.55 * h, 0.4 * n, 0.8 * h, look.glass, label, instance)
        plane.rectangle(0.55 * n, 0.55 * h, 0.8 * n, 0.8 * h, look.glass, label, instance)
    _wheel(plane, 0.45 * n, 0.34, label, instance)


def box_back(plane: Plane, look: Look, instance) -> None:
    """Draw the back of a caravan or trailer."""
    w, h, label = look.width, look.height, look.label
    plane.rectangle(0, 0.4, w, h, gradient(look.lacquer, h), label, instance)
    if label == ID["caravan"]:
        plane.rectangle(0.15 * w, 0.55 * h, 0.85 * w, 0.85 * h, look.glass, label, instance)


_VIEWS = {
    "car": (car_side, car_back),
    "truck": (truck_side, truck_back),
    "bus": (bus_side, bus_back),
    "train": (train_side, train_back),
    "caravan": (box_side, box_back),
    "trailer": (box_side, box_back),
}


def vehicle(scene: Scene, kind: str, offset: float, z: float, along: bool) -> None:
    """Draw a vehicle.

    Args:
        scene: the scene.
        kind: label name.
        offset: position in meters to the right of the road center.
        z: distance in meters.
        along: whether it stands along the road or across it.
    """
    rng, camera = scene.rng, scene.camera
    look, instance = Look.draw(rng, kind), scene.instance(ID[kind])
    side, back = _VIEWS[kind]
    middle = camera.middle(z) + offset
    if not along:
        mirrored = rng.random() < 0.5
        left = middle - look.length / 2
        scene.shadow(left, left + look.length, z, 1.5)
        side(scene.upright(left + look.length if mirrored else left, z, mirrored), look, instance)
        return
    left = middle - look.width / 2
    scene.shadow(left, left + look.width, z, look.length * 0.5)
    run = camera.middle(z + look.length) - camera.middle(z)
    if left > 0 or left + look.width < 0:
        flank = left if left > 0 else left + look.width
        side(Plane(scene, flank, z, run, look.length), look, instance)
    back(scene.upright(left, z), look, instance)


# Street furniture.


def _tube(base: Color, middle: float, width: float) -> Material:
    """Return the material of a round post, lit from one side."""

    def material(s, t):
        return base * (1.15 - 0.9 * np.abs((s - middle) / width + 0.2) + 0 * t)

    return material


def pole(plane: Plane, rng, height: float, label: int = ID["pole"]) -> None:
    """Draw a pole, or a street lamp if it is taller than 5 m."""
    width = rng.uniform(0.2, 0.34)
    base = color(rng, (0, 1), (0, 0.25), (0.25, 0.8))
    plane.rectangle(-width / 2, 0, width / 2, height, _tube(base, 0, width), label)
    plane.rectangle(-width * 0.8, 0, width * 0.8, 0.5, base * 0.7, label)
    if height > 5:  # street lamp
        reach = rng.choice([-1, 1]) * rng.uniform(0.9, 1.8)
        plane.stroke((0, height - 0.15), (reach, height), 0.16, base, label)
        plane.stroke((reach * 0.7, height), (reach * 1.2, height - 0.05), 0.26, base * 0.7, label)


def traffic_light(plane: Plane, rng, s: float, t: float) -> None:
    """Draw a traffic light with its foot at (s, t): a dark box with three lamps, of which some are lit."""
    label = ID["traffic light"]
    lamps = bgr(45, 45, 250), bgr(40, 190, 250), bgr(120, 235, 60)
    wide, tall = rng.uniform(0.6, 0.8), rng.uniform(1.5, 2.0)
    case = color(rng, (0, 1), (0, 0.4), (0.06, 0.22))
    plane.rectangle(s - wide / 2, t, s + wide / 2, t + tall, case, label)
    lit = rng.integers(0, 3)
    for i in range(3):
        shown = lamps[i] if i == lit or rng.random() < 0.1 else lamps[i] * 0.22
        plane.disc(s, t + tall * (5 - 2 * i) / 6, wide * 0.32, shown, label)


def traffic_sign(plane: Plane, rng, s: float, t: float) -> None:
    """Draw a traffic sign with its foot at (s, t): round, triangular, square, or a direction sign."""
    label, size = ID["traffic sign"], rng.uniform(0.42, 0.62)
    vivid = [(0.98, 1.02), (0.57, 0.63), (0.12, 0.16), (0.36, 0.42)][rng.integers(0, 4)]
    rim, ground = color(rng, vivid, (0.75, 1), (0.6, 0.95)), _WHITE
    if rng.random() < 0.5:
        rim, ground = ground, rim
    middle = t + size
    kind = rng.integers(0, 5)
    if kind == 4:
        wide = rng.uniform(1.0, 1.7)
        plane.rectangle(s - wide, t, s + wide, t + 1.5, rim, label)
        plane.rectangle(s - wide + 0.12, t + 0.12, s + wide - 0.12, t + 1.38, ground, label)
        for row in (0.35, 0.7, 1.05):
            plane.stroke(
                (s - wide * 0.75, t + row), (s + wide * rng.uniform(0.1, 0.75), t + row), 0.14, rim, label
            )
        return
    corners = {0: 20, 1: 3, 2: 4, 3: 4}[int(kind)]
    turn = {0: 0.0, 1: math.pi / 2, 2: math.pi / 4, 3: 0.0}[int(kind)]
    for radius, paint in ((size * 1.15, rim), (size * 0.75, ground)):
        ring = [turn + 2 * math.pi * i / corners for i in range(corners)]
        plane.polygon([(s + radius * math.cos(a), middle + radius * math.sin(a)) for a in ring], paint, label)
    plane.stroke((s - 0.2, middle), (s + 0.2, middle), 0.14, rim * 0.5, label)


# Objects along the street.


def tree(plane: Plane, rng, foliage: Material, height: float) -> None:
    """Draw a tree: a trunk and a crown of overlapping clumps, all labeled vegetation."""
    label = ID["vegetation"]
    bark = color(rng, (0.05, 0.12), (0.15, 0.5), (0.15, 0.4))
    plane.rectangle(-0.22, 0, 0.22, 0.55 * height, _tube(bark, 0, 0.44), label)
    reach = 0.3 * height
    for _ in range(7):
        s, t = rng.uniform(-0.7, 0.7) * reach, rng.uniform(0.55, 0.85) * height
        bumps = rng.uniform(0.8, 1.1, 14) * reach * 0.55
        ring = [
            (s + r * math.cos(i * math.pi / 7), t + r * math.sin(i * math.pi / 7))
            for i, r in enumerate(bumps)
        ]
        plane.polygon(ring, foliage, label)


def hedge(plane: Plane, rng, foliage: Material, length: float, height: float) -> None:
    """Draw a hedge with a ragged top."""
    steps = max(int(length / 0.6), 3)
    top = [(length * i / steps, height * rng.uniform(0.8, 1.1)) for i in range(steps + 1)]
    plane.polygon([(0, 0), *top, (length, 0)], foliage, ID["vegetation"])


def fence(plane: Plane, rng, length: float, height: float) -> None:
    """Draw a fence: vertical bars between two rails. The gaps are labeled fence too."""
    label, base = ID["fence"], mostly(rng, (0.35, 0.5), (0.3, 0.7), (0.25, 0.55), 0.6)
    period, share = rng.uniform(0.34, 0.5), rng.uniform(0.4, 0.55)
    plane.rectangle(0, 0, length, height, None, label)
    count = int(length / period)
    bars = [
        [
            (i * period, 0),
            (i * period, height),
            (i * period + share * period, height),
            (i * period + share * period, 0),
        ]
        for i in range(count)
    ]
    plane.shape(bars, gradient(base, height), label)
    for t in (0.12 * height, 0.88 * height):
        plane.rectangle(0, t, length, t + 0.1 * height, base * 0.85, label)


def block(
    scene: Scene, rng, x: float, z: float, run: tuple[float, float], outward: float, depth: float
) -> None:
    """Draw a building along `run` from (x, z), with an end wall of width `depth` that faces the camera."""
    label, story = ID["building"], rng.uniform(2.6, 3.4)
    tall = story * rng.integers(2, 7) + rng.uniform(0.6, 1.2)
    base = mostly(rng, (0.02, 0.13), (0.05, 0.5), (0.5, 0.9), 0.8)
    surface = facade(rng, base, story)
    length = math.hypot(*run)
    end = scene.upright(x, z, mirrored=outward < 0)
    end.rectangle(0, 0, depth, tall, surface, label)
    if rng.random() < 0.5:  # gable
        end.polygon([(0, tall), (depth / 2, tall + depth * 0.3), (depth, tall)], base * 0.8, label)
    front = Plane(scene, x, z, *run)
    front.rectangle(0, 0, length, tall, surface, label)
    eaves = stripes(base * 0.45, base * 0.6, 0.4, 0.5, upright=True)
    front.rectangle(0, tall - 0.5, length, tall + rng.uniform(0, 1.2), eaves, label)


def clutter(plane: Plane, rng, label: int) -> None:
    """Draw a void object on the sidewalk: a trash can or cabinet (static), a bag or stroller (dynamic)."""
    wide, tall = rng.uniform(0.5, 1.0), rng.uniform(0.5, 1.2)
    plane.rectangle(-wide / 2, 0, wide / 2, tall, gradient(anything(rng), tall), label)
    plane.rectangle(-wide / 2, tall * 0.85, wide / 2, tall, _BLACK * 2, label)
