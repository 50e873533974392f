"""A small mesh renderer in NumPy: reads OBJ + MTL, draws them with a z-buffer at known poses.

World z up; camera-to-world matrices with OpenGL axes (x right, y up, looking along -z); square
pixels, the principal point in the middle, pixel centers at + 0.5. A camera point (X, Y, Z) lands
at (W/2 + f X / -Z, W/2 - f Y / -Z) with f = W / (2 tan(angle / 2)).

Shapes: V vertices, F triangles, N fragments (a triangle's share of one sample), S samples a side.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

TEXTURE_SIZE = 256  # textures are reduced to this, or they alias in small pictures
MIN_OPACITY = 0.3  # materials and texels below are not drawn (glass, gaps between leaves)
UP = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]], dtype=np.float32)  # y up -> z up
DARKEST = 0.06  # albedo of black: pure black would hide all shape
AMBIENT = 0.45
LIGHTS = (  # (direction towards the light, strength), fixed in the world: objects face -y
    (np.array([-0.45, -0.55, 0.70]), 0.55), (np.array([0.80, 0.40, 0.45]), 0.20))


@dataclass
class Material:
    """How a surface reflects: color and opacity in [0, 1], or a texture instead of the color."""

    color: tuple = (0.7, 0.7, 0.7)
    opacity: float = 1.0
    texture: np.ndarray | None = None  # (H, W, 4) in [0, 1], top row first


@dataclass
class Mesh:
    """Triangles; corner arrays index the attribute arrays, -1 where a corner has none."""

    vertices: np.ndarray  # (V, 3)
    uvs: np.ndarray  # (T, 2)
    normals: np.ndarray  # (M, 3)
    corners: np.ndarray  # (F, 3, 3) per corner: vertex, uv, normal
    material: np.ndarray  # (F,) index into materials
    materials: list


# ---- Reading --------------------------------------------------------------------------------


def load_texture(folder, name):
    """Read a texture as (H, W, 4), or None; names may be another disk's paths, or mis-cased."""
    name = name.replace("\\", "/").rsplit("/", 1)[-1].strip().lower()
    found = [path for path in sorted(folder.iterdir()) if path.name.lower() == name]
    if not found:
        return None
    image = Image.open(found[0]).convert("RGBA")
    image.thumbnail((TEXTURE_SIZE, TEXTURE_SIZE), Image.BOX)
    return np.asarray(image, dtype=np.float32) / 255


def load_materials(path):
    """Read what is drawn of an MTL file (Kd, d and map_Kd) as {name: Material}."""
    materials, current = {}, Material()
    for line in path.read_text(errors="replace").splitlines():
        key, _, value = line.strip().partition(" ")
        if key == "newmtl":
            current = materials[value.strip()] = Material()
        elif key == "Kd":
            current.color = tuple(float(x) for x in value.split()[:3])
        elif key == "d":
            current.opacity = float(value.split()[-1])
        elif key == "map_Kd":
            current.texture = load_texture(path.parent, value)
    return materials


def load_obj(path):
    """Read an OBJ file and its materials as a Mesh; polygons become triangle fans."""
    rows, corners, material = {"v": [], "vt": [], "vn": []}, [], []
    index, names, library = 0, {}, {}
    for line in path.read_text(errors="replace").splitlines():
        key, _, value = line.partition(" ")
        if key in rows:
            rows[key].append([float(x) for x in value.split()[:2 if key == "vt" else 3]])
        elif key == "f":
            polygon = []
            for corner in value.split():  # 1, 1/2, 1//3 or 1/2/3; negative: from the last one
                fields = [int(x) if x else 0 for x in corner.split("/")] + [0, 0]
                polygon.append([i - 1 if i >= 0 else i + len(known)
                                for i, known in zip(fields, rows.values())])
            corners += [(polygon[0], *pair) for pair in zip(polygon[1:], polygon[2:])]
            material += [index] * (len(polygon) - 2)
        elif key == "usemtl":
            index = names.setdefault(value.strip(), len(names) + 1)
        elif key == "mtllib" and (path.parent / value.strip()).exists():
            library.update(load_materials(path.parent / value.strip()))
    return Mesh(np.array(rows["v"], np.float32), np.array(rows["vt"] or [[0, 0]], np.float32),
                np.array(rows["vn"] or [[0, 0, 0]], np.float32),
                np.array(corners, np.int64).reshape(-1, 3, 3), np.array(material, np.int64),
                [Material()] + [library.get(name, Material()) for name in names])


def normalise(mesh, rotation=None):
    """Turn a y-up mesh to z up and put its bounding box (diagonal 2) around the origin.

    rotation: (3, 3), applied first. See-through triangles are dropped; ValueError if none is left.
    """
    turn = UP if rotation is None else UP @ np.asarray(rotation, np.float32)
    solid = np.array([m.opacity >= MIN_OPACITY for m in mesh.materials])[mesh.material]
    mesh.corners, mesh.material = mesh.corners[solid], mesh.material[solid]
    if not len(mesh.corners):
        raise ValueError("no opaque triangle")
    mesh.vertices, mesh.normals = mesh.vertices @ turn.T, mesh.normals @ turn.T
    used = mesh.vertices[mesh.corners[..., 0].ravel()]
    low, high = used.min(0), used.max(0)
    mesh.vertices = (mesh.vertices - (low + high) / 2) * (2 / np.linalg.norm(high - low))
    return mesh


# ---- Drawing --------------------------------------------------------------------------------


def look_at_origin(position):
    """Camera-to-world (4, 4) of an upright camera at `position` that looks at the origin."""
    back = position / np.linalg.norm(position)
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3] = np.stack([right, np.cross(back, right), back, position], axis=1)
    return pose


def expand(low, high, size):
    """Samples of `size` with centers (index + 0.5) from low to high: index of range, sample."""
    first = np.clip(np.ceil(low - 0.5), 0, size).astype(int)
    counts = np.clip(np.floor(high - 0.5), -1, size - 1).astype(int) - first + 1
    counts = np.maximum(counts, 0)
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - (np.cumsum(counts) - counts - first)[owner]


def fragments(x, y, inverse_depth, size):
    """Which samples each triangle covers; x, y (in samples) and inverse_depth: (3, F) corners.

    Returns sample index (N,), triangle (N,), inverse depth (N,) and the perspective-correct
    barycentric weights (N, 3).
    """
    area = (x[1] - x[0]) * (y[2] - y[0]) - (x[2] - x[0]) * (y[1] - y[0])
    hit = np.flatnonzero(np.abs(area) > 1e-12)
    owner, row = expand(y.min(0)[hit], y.max(0)[hit], size)
    face = hit[owner]

    # Barycentric weights are linear in x: along a row, weight_j = start_j + slope_j * x.
    x, y, area = x[:, face], y[:, face], area[face]
    following, last = [1, 2, 0], [2, 0, 1]
    slope = (y[following] - y[last]) / area  # (3, rows)
    start = ((row + 0.5 - y[last]) * (x[last] - x[following]) - slope * area * x[last]) / area
    with np.errstate(divide="ignore", invalid="ignore"):
        zero = -start / slope
    left = np.where(slope > 0, zero, np.where((slope < 0) | (start >= 0), -1, size)).max(0)
    right = np.where(slope < 0, zero, size).min(0)
    owner, column = expand(left, right, size)

    face, row = face[owner], row[owner]
    weights = np.maximum(start[:, owner] + slope[:, owner] * (column + 0.5), 0)
    weights *= inverse_depth[:, face]
    depth = weights.sum(0)
    return row * size + column, face, depth, (weights / depth).T


def albedo(mesh, face, weights):
    """Color with opacity (N, 4) at points of triangles; textures repeat outside [0, 1]."""
    table = np.array([[*m.color, m.opacity] for m in mesh.materials], np.float32)
    rgba = table[mesh.material[face]]
    for index, material in enumerate(mesh.materials):
        if material.texture is None:
            continue
        chosen = (mesh.material[face] == index) & (mesh.corners[face, :, 1] >= 0).all(1)
        uv = mesh.uvs[mesh.corners[face[chosen], :, 1]]  # (n, 3, 2)
        u, v = ((uv * weights[chosen, :, None]).sum(1) % 1).T
        height, width = material.texture.shape[:2]
        column = np.minimum((u * width).astype(int), width - 1)
        row = np.minimum(((1 - v) * height).astype(int), height - 1)
        rgba[chosen] = material.texture[row, column]
    return rgba


def shade(mesh, face, weights, position):
    """Light (N,) at points of triangles, on the side that faces the camera at `position`."""
    a, b, c = mesh.vertices[mesh.corners[face, :, 0]].transpose(1, 0, 2)
    flat = np.cross(b - a, c - a)
    flat *= np.sign(((position - a) * flat).sum(-1, keepdims=True))
    smooth = (mesh.normals[mesh.corners[face, :, 2]] * weights[..., None]).sum(1)
    smooth *= np.sign((smooth * flat).sum(-1, keepdims=True))
    usable = (mesh.corners[face, :, 2] >= 0).all(1) & (np.abs(smooth).sum(-1) > 1e-6)
    normal = np.where(usable[:, None], smooth, flat)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True) + 1e-12
    return sum((strength * np.maximum(normal @ (direction / np.linalg.norm(direction)), 0)
                for direction, strength in LIGHTS), np.full(len(face), AMBIENT))


def render(mesh, pose, size, angle, supersample):
    """Draw a normalised mesh: (size, size, 4) uint8, straight alpha, transparent background."""
    side = size * supersample
    position = pose[:3, 3]
    camera = pose[:3, :3].T @ (mesh.vertices - position).T  # (3, V)
    inverse_depth = -1 / camera[2]
    focal = side / (2 * np.tan(angle / 2))
    x = side / 2 + focal * camera[0] * inverse_depth
    y = side / 2 - focal * camera[1] * inverse_depth
    corner = np.ascontiguousarray(mesh.corners[..., 0].T)  # (3, F)
    sample, face, depth, weights = fragments(x[corner], y[corner], inverse_depth[corner], side)
    rgba = albedo(mesh, face, weights)
    depth[rgba[:, 3] < MIN_OPACITY] = 0  # infinitely far
    nearest = np.zeros(side * side)
    np.maximum.at(nearest, sample, depth)
    front = (depth > 0) & (depth == nearest[sample])
    sample, face, weights = sample[front], face[front], weights[front]
    rgb = DARKEST + (1 - DARKEST) * rgba[front, :3]
    rgb *= shade(mesh, face, weights, position)[:, None]

    picture = np.zeros((side * side, 4))
    picture[sample, :3] = np.clip(rgb, 0, 1)
    picture[sample, 3] = 1
    picture = picture.reshape(size, supersample, size, supersample, 4).mean((1, 3))
    picture[..., :3] /= np.maximum(picture[..., 3:], 1e-6)  # mean of the covered samples
    return (picture * 255).round().astype(np.uint8)
