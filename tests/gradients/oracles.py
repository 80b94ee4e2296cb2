"""The rules' equations in plain Python floats; a gradient is a list of tensors, a tensor a list of numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

Vector = list[float]
Gradient = list[Vector]


def dot(x: Vector, y: Vector) -> float:
    return math.fsum(a * b for a, b in zip(x, y, strict=True))


def flat(tensors: Gradient) -> Vector:
    return [value for tensor in tensors for value in tensor]


def unit(tensors: Gradient) -> float:
    return math.sqrt(dot(flat(tensors), flat(tensors)))


def linear(a: float, x: Vector, b: float, y: Vector) -> Vector:
    return [a * u + b * v for u, v in zip(x, y, strict=True)]


def sam_displacement(g: Gradient, rho: float) -> Gradient:
    return [[rho / unit(g) * value for value in tensor] for tensor in g]


def sagm_displacement(g: Gradient, rho: float, alpha: float, share: float) -> Gradient:
    return [[rho / unit(g) * value - alpha * value / share for value in tensor] for tensor in g]


def asam_displacement(w: Gradient, g: Gradient, rho: float) -> Gradient:
    scaled = [[abs(a) * b for a, b in zip(x, y, strict=True)] for x, y in zip(w, g, strict=True)]
    return [[rho * a * a * b / unit(scaled) for a, b in zip(x, y, strict=True)] for x, y in zip(w, g, strict=True)]


def glad(g: Gradient, g_s: Gradient, low: float, up: float, scope: str) -> Gradient:
    def steered(x: Vector, y: Vector, cosine: float, k: float) -> Vector:
        if math.isnan(cosine) or cosine >= up:
            return y
        return x if cosine <= low else linear(k, x, k, y)

    def decide(x: Vector, y: Vector) -> tuple[float, float]:
        lengths = math.sqrt(dot(x, x)) * math.sqrt(dot(y, y))
        z = linear(1, x, 1, y)
        return (dot(x, y) / lengths, dot(y, z) / dot(z, z)) if lengths else (math.nan, math.nan)

    if scope == "global":
        cosine, k = decide(flat(g), flat(g_s))
        return [steered(x, y, cosine, k) for x, y in zip(g, g_s, strict=True)]
    return [steered(x, y, *decide(x, y)) for x, y in zip(g, g_s, strict=True)]


def gsam(g: Gradient, g_s: Gradient, alpha: float) -> Gradient:
    share = dot(flat(g), flat(g_s)) / dot(flat(g_s), flat(g_s))
    perpendicular = [linear(1, x, -share, y) for x, y in zip(g, g_s, strict=True)]
    return [linear(1, y, -alpha, p) for y, p in zip(g_s, perpendicular, strict=True)]


def mixed(a: float, b: float) -> Callable[[Gradient, Gradient], Gradient]:
    return lambda g, g_s: [linear(a, x, b, y) for x, y in zip(g, g_s, strict=True)]


def perpgrad(w: Vector, g: Vector) -> Vector:
    if not dot(w, w):
        return g
    perpendicular = linear(1, g, -dot(w, g) / dot(w, w), w)
    length, kept = math.sqrt(dot(g, g)), math.sqrt(dot(perpendicular, perpendicular))
    return perpendicular if kept < 1e-6 * length else [value * length / kept for value in perpendicular]
