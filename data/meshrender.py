"""A small mesh renderer in NumPy: reads OBJ + MTL, draws them with a z-buffer at known poses.

Conventions: world z up; camera-to-world matrices with OpenGL axes (x right, y up, looking along
-z); square pixels, the principal point in the middle, pixel centres at + 0.5. A camera point
(X, Y, Z) lands at (W/2 + f X / -Z, W/2 - f Y / -Z) with f = W / (2 tan(angle / 2)).

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
    (np.array([-0.45, -0.55, 0.70]), 0.55),
    (np.array([0.80, 0.40, 0.45]), 0.20),
)


@dataclass
class Material:
    """How a surface reflects: color and opacity in [0, 1], or a texture instead of the color."""

    colour: tuple = (0.7, 0.7, 0.7)
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
            current.colour = tuple(float(x) for x in value.split()[:3])
        elif key == "d":
            current.opacity = float(value.split()[-1])
        elif key == "map_Kd":
            current.texture = load_texture(path.parent, value)
    return materials


def parse_face(line, counts):
    """One 'f' line as a list of triangles of (vertex, uv, normal) indices, -1 for absent ones.

    counts: number of vertices, uvs and normals so far, which negative indices count back from.
    """
    polygon = []
    for corner in line.split()[1:]:
        fields = [int(x) if x else 0 for x in corner.split("/")] + [0, 0]
        v, t, n = (i - 1 if i >= 0 else i + count for i, count in zip(fields, counts))
        polygon.append((v, t, n))
    return [(polygon[0], polygon[k], polygon[k + 1]) for k in range(1, len(polygon) - 1)]


def load_obj(path):
    """Read an OBJ file and its materials as a Mesh; polygons become triangle fans."""
    rows = {"v": [], "vt": [], "vn": []}
    names, index, corners, material = {}, 0, [], []
    library = {}
    for line in path.read_text(errors="replace").splitlines():
        key, _, value = line.partition(" ")
        if key in rows:
            rows[key].append([float(x) for x in value.split()[:2 if key == "vt" else 3]])
        elif key == "f":
            triangles = parse_face(line, [len(rows[k]) for k in ("v", "vt", "vn")])
            corners.extend(triangles)
            material.extend([index] * len(triangles))
        elif key == "usemtl":
            index = names.setdefault(value.strip(), len(names) + 1)
        elif key == "mtllib" and (path.parent / value.strip()).exists():
            library.update(load_materials(path.parent / value.strip()))
    return Mesh(
        vertices=np.array(rows["v"], np.float32),
        uvs=np.array(rows["vt"] or [[0, 0]], np.float32),
        normals=np.array(rows["vn"] or [[0, 0, 0]], np.float32),
        corners=np.array(corners, np.int64).reshape(-1, 3, 3),
        material=np.array(material, np.int64),
        materials=[Material()] + [library.get(name, Material()) for name in names],
    )


def normalise(mesh, rotation=None):
    """Turn a y-up mesh to z up and put its bounding box (diagonal 2) around the origin.

    rotation: optional (3, 3) applied first. Triangles of see-through materials are dropped, so
    every vertex left in use lies in the unit sphere. Raises ValueError if nothing is left.
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
    pose[:3, :3] = np.stack([right, np.cross(back, right), back], axis=1)
    pose[:3, 3] = position
    return pose


def sample_range(low, high, size):
    """First and last of `size` samples whose centres (index + 0.5) lie between low and high."""
    first = np.clip(np.ceil(low - 0.5), 0, size).astype(int)
    return first, np.clip(np.floor(high - 0.5), -1, size - 1).astype(int)


def expand(first, last):
    """Write out integer ranges: owner (N,) and value (N,) for every first[i]..last[i]."""
    counts = np.maximum(last - first + 1, 0)
    owner = np.repeat(np.arange(len(counts)), counts)
    value = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts) + first[owner]
    return owner, value


def fragments(x, y, inverse_depth, size):
    """Which samples each triangle covers: first its rows, then on each row its columns.

    x, y, inverse_depth: (3, F) corners, the first two in samples.
    Returns sample index (N,), triangle (N,), inverse depth (N,) and the perspective-correct
    barycentric weights (N, 3).
    """
    top, bottom = sample_range(y.min(0), y.max(0), size)
    left, right = sample_range(x.min(0), x.max(0), size)
    area = (x[1] - x[0]) * (y[2] - y[0]) - (x[2] - x[0]) * (y[1] - y[0])
    hit = np.flatnonzero((np.abs(area) > 1e-12) & (top <= bottom) & (left <= right))
    owner, row = expand(top[hit], bottom[hit])
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
    owner, column = expand(*sample_range(left, right, size))

    face, row = face[owner], row[owner]
    weights = np.maximum(start[:, owner] + slope[:, owner] * (column + 0.5), 0)
    weights *= inverse_depth[:, face]
    depth = weights.sum(0)
    return row * size + column, face, depth, (weights / depth).T


def albedo(mesh, face, weights):
    """Colour with opacity (N, 4) at points of triangles; textures repeat outside [0, 1]."""
    table = np.array([[*m.colour, m.opacity] for m in mesh.materials], np.float32)
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
    light = np.full(len(face), AMBIENT)
    for direction, strength in LIGHTS:
        light += strength * np.maximum(normal @ (direction / np.linalg.norm(direction)), 0)
    return light


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
    cutout = np.array([m.texture is not None and m.texture[..., 3].min() < MIN_OPACITY
                       for m in mesh.materials])
    if cutout.any():
        drawn = ~cutout[mesh.material[face]]
        drawn[~drawn] = albedo(mesh, face[~drawn], weights[~drawn])[:, 3] >= MIN_OPACITY
        sample, face, depth, weights = (x[drawn] for x in (sample, face, depth, weights))
    nearest = np.zeros(side * side)
    np.maximum.at(nearest, sample, depth)
    front = depth == nearest[sample]
    sample, face, weights = sample[front], face[front], weights[front]
    rgb = DARKEST + (1 - DARKEST) * albedo(mesh, face, weights)[:, :3]
    rgb *= shade(mesh, face, weights, position)[:, None]

    picture = np.zeros((side * side, 4))
    picture[sample, :3] = np.clip(rgb, 0, 1)
    picture[sample, 3] = 1
    picture = picture.reshape(size, supersample, size, supersample, 4).mean((1, 3))
    picture[..., :3] /= np.maximum(picture[..., 3:], 1e-6)  # mean of the covered samples
    return (picture * 255).round().astype(np.uint8)
