"""Pictures of what is in a buffer: one gif per policy, and an mp4 where an encoder is found.

    python -m envs.render runs/wurl_sac/ant/seed0         every policy of a run
    python -m envs.render runs/wurl_sac/ant/seed0 --together   all policies in one gif, from above
    python -m envs.render best.npz --episode last         one buffer file

No display is needed. A robot is drawn by MuJoCo's renderer through EGL, or, on a machine without
OpenGL, as stick figures; its pose is put together from observations and root positions, so
nothing is simulated again. A point robot is drawn as its path.
"""

import argparse
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

import numpy as np

from envs import buffers
from envs.base import quiet_imports
from envs.errors import InputError
from envs.robots import ROBOTS

POINT_WORLDS = ("point", "tree-maze")
VIEWER_NOTE = (
    "This page loads its viewer's script from cdn.jsdelivr.net and unpkg.com when it is opened: "
    "it needs the internet, and it needs you to trust them."
)


class Episode(NamedTuple):
    """One episode of a buffer. qpos (T, nq), empty for point robots; positions (T + 1, 2)."""

    title: str
    env: str
    dt: float
    qpos: np.ndarray
    positions: np.ndarray


def find_buffers(path: str) -> list[pathlib.Path]:
    """Return the buffer files of a run's folder, or the file itself."""
    found = pathlib.Path(path)
    if found.is_file():
        return [found]
    files = sorted(found.glob("buffers/policy_*.npz")) or sorted(found.glob("policy_*.npz"))
    if not files:
        raise InputError(
            f"{path}: neither a buffer file nor a run's folder with buffers/policy_*.npz; runs of wurl_sac.py have them"
        )
    return files


def read_episode(path: pathlib.Path, which: str = "best") -> Episode:
    """Read one episode of a buffer file.

    which: "best" (by return; the last where nothing is rewarded), "last", or an index.
    """
    keys = ("observations", "root_positions", "root_velocities", "episode_ends", "episode_returns")
    buffer = buffers.load(path, keys=keys, quiet=True)
    env, ends = buffer.metadata["env"], buffer["episode_ends"]
    if env not in POINT_WORLDS and env not in ROBOTS:
        raise InputError(
            f"{path}: poses of '{env}' cannot be rebuilt from its observations; what can be "
            f"drawn: {', '.join((*POINT_WORLDS, *ROBOTS))}"
        )
    index = _choose(path, which, buffer["episode_returns"], buffer.metadata["reward_kind"])
    rows = slice(int(ends[index - 1]) if index else 0, int(ends[index]))
    roots, dt = np.array(buffer["root_positions"][rows]), buffer.metadata["dt"]
    after = roots[-1:] + dt * buffer["root_velocities"][rows][-1:]
    title = f"{path.stem}, episode {index + 1} of {len(ends)}"
    if buffer.metadata["reward_kind"] != "none":
        title += f", {buffer.metadata['task']} return {buffer['episode_returns'][index]:.1f}"
    qpos = np.empty((0, 0))
    if env in ROBOTS:
        qpos = rebuild_qpos(env, np.array(buffer["observations"][rows]), roots)
    return Episode(title, env, dt, qpos, np.concatenate([roots, after]))


def _choose(path, which: str, returns: np.ndarray, reward_kind: str) -> int:
    if which == "last" or (which == "best" and reward_kind == "none"):
        return len(returns) - 1
    if which == "best":
        return int(np.argmax(returns))
    if not which.isdigit() or int(which) >= len(returns):
        raise InputError(
            f"{path}: --episode {which} is neither 'best' nor 'last' nor below {len(returns)}, the episodes in the file"
        )
    return int(which)


def rebuild_qpos(env: str, observations: np.ndarray, roots: np.ndarray) -> np.ndarray:
    """Put poses (T, nq) together from observations (T, S) in either layout and roots (T, 2).

    Observations end in qvel and begin with qpos, from which the first 0, 1 or 2 entries may be
    missing: those are the root's.
    """
    model = load_robot(env)
    observed = observations.shape[1] - model.nv
    hidden = model.nq - observed
    if not 0 <= hidden <= 2:
        raise InputError(f"observations of {observations.shape[1]} entries do not fit '{env}'")
    return np.concatenate([roots[:, :hidden], observations[:, :observed]], axis=1)


def load_robot(env: str):
    """Load the MuJoCo model that a world's robot is drawn with."""
    from envs.physics import load_model

    return load_model(ROBOTS[env].xml, in_maze=ROBOTS[env].maze)


# --- frames: (F, height, width, 3) uint8 --------------------------------------------------------


def draw(episode: Episode, steps: np.ndarray, size: tuple[int, int], open_gl: bool) -> np.ndarray:
    """Draw an episode at some of its steps."""
    if episode.env in POINT_WORLDS:
        return draw_path(episode, steps, size)
    if open_gl:
        return draw_robot(episode, steps, size)
    return draw_sticks(episode, steps, size)


def open_gl_works() -> bool:
    """Whether MuJoCo can render here; asked in another process, since a failure can be fatal.

    Chooses EGL where MUJOCO_GL is not set, which has to happen before MuJoCo is imported.
    """
    os.environ.setdefault("MUJOCO_GL", "egl")
    probe = "import mujoco; m = mujoco.MjModel.from_xml_string('<mujoco/>'); mujoco.Renderer(m, 8, 8).render()"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True)
    if done.returncode:
        os.environ["MUJOCO_GL"] = "disable"  # else MuJoCo could not be imported either
    return done.returncode == 0


def draw_robot(episode: Episode, steps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Draw poses with MuJoCo's renderer, the camera following the robot."""
    import mujoco

    model = load_robot(episode.env)
    data = mujoco.MjData(model)
    camera = mujoco.MjvCamera()
    camera.type = mujoco.mjtCamera.mjCAMERA_TRACKING
    camera.trackbodyid = 1
    planar = model.jnt_type[0] != mujoco.mjtJoint.mjJNT_FREE
    camera.distance, camera.elevation = (4.0, -10.0) if planar else (5.0, -30.0)
    camera.azimuth = 90.0
    frames = []
    with mujoco.Renderer(model, size[1], size[0]) as renderer:
        for step in steps:
            data.qpos[:] = episode.qpos[step]
            mujoco.mj_forward(model, data)
            renderer.update_scene(data, camera)
            frames.append(renderer.render().copy())
    return np.stack(frames)


def draw_sticks(episode: Episode, steps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Draw poses as lines along the robot's capsules, seen from the side (planar) or askew."""
    ends, planar = capsules_of(episode.env, episode.qpos[steps])
    turn, tilt = (0.0, 0.0) if planar else (np.radians(30.0), np.radians(25.0))
    right, ahead = (np.cos(turn), np.sin(turn), 0.0), np.array([-np.sin(turn), np.cos(turn), 0.0])
    view = np.stack([right, np.sin(tilt) * ahead + np.cos(tilt) * np.eye(3)[2]])
    figure, axes = _blank(size)
    frames = []
    for flat in ends @ view.T:
        centre = flat.mean((0, 1))
        axes.clear()
        axes.plot(flat[..., 0], flat[..., 1], color="tab:blue", linewidth=4)
        if planar:
            axes.axhline(0.0, color="0.6")
        axes.set(xlim=centre[0] + np.array([-2, 2]), ylim=centre[1] + np.array([-1.5, 1.5]))
        axes.set_aspect("equal")
        axes.set_title(episode.title, fontsize=8)
        frames.append(_snapshot(figure))
    return np.stack(frames)


def draw_together(episodes: list[Episode], steps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Draw one episode of each policy in one picture, with the path so far: from above, planar robots from the side."""
    from envs.figures import colours

    world = episodes[0].env
    poses = [capsules_of(world, e.qpos[np.minimum(steps, len(e.qpos) - 1)]) if len(e.qpos) else None for e in episodes]
    planar = world in ROBOTS and poses[0][1]
    figure, axes = _blank(size, layout="constrained")
    ends = np.concatenate([e.positions for e in episodes])
    centre, reach = (ends.min(0) + ends.max(0)) / 2, np.ptp(ends, axis=0).max() / 2 + 1
    low, high = centre - reach, centre + reach
    if planar:  # the second number of a position is the height
        low[1], high[1] = -0.5, max(ends[:, 1].max() + 1, 2.0)
    frames = []
    for frame, step in enumerate(steps):
        axes.clear()
        for episode, pose, colour in zip(episodes, poses, colours(len(episodes)), strict=True):
            at = min(step, len(episode.positions) - 1)  # it may have ended before
            axes.plot(*episode.positions[: at + 1].T, color=colour, linewidth=1, alpha=0.6)
            axes.plot(*episode.positions[at], "o", color=colour, markersize=4)
            if pose is None:
                continue
            axes.plot(*np.moveaxis(pose[0][frame][..., [0, 2] if planar else [0, 1]], -1, 0), color=colour, linewidth=2)
        axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
        axes.set_aspect("equal")
        axes.set_title(f"{world}, {len(episodes)} policies, {step * episodes[0].dt:.1f} s", fontsize=8)
        frames.append(_snapshot(figure))
    return np.stack(frames)


def capsules_of(env: str, qpos: np.ndarray) -> tuple[np.ndarray, bool]:
    """Ends of a robot's capsules in poses (T, nq) -> (T, 2, capsules, 3), whether the robot is planar."""
    import mujoco

    model = load_robot(env)
    data = mujoco.MjData(model)
    capsules = np.flatnonzero(model.geom_type == mujoco.mjtGeom.mjGEOM_CAPSULE)
    ends = []
    for pose in qpos:
        data.qpos[:] = pose
        mujoco.mj_kinematics(model, data)
        axis = data.geom_xmat[capsules].reshape(-1, 3, 3)[:, :, 2]
        reach = axis * model.geom_size[capsules, 1:2]
        ends.append(data.geom_xpos[capsules][None] + np.stack([-reach, reach]))
    return np.stack(ends), model.jnt_type[0] != mujoco.mjtJoint.mjJNT_FREE


def draw_path(episode: Episode, steps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Draw a point robot's path as it grows."""
    from matplotlib.patches import Rectangle

    figure, axes = _blank(size)
    path = episode.positions
    if episode.env == "tree-maze":
        from envs.point import TREE_BLOCKS, TREE_SIDE

        for x0, y0, x1, y1 in TREE_BLOCKS:
            axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, color="0.75"))
        axes.set(xlim=(0, TREE_SIDE), ylim=(0, TREE_SIDE))
    else:
        reach = max(1.0, 1.1 * float(np.abs(path).max()))
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach))
    axes.set_aspect("equal")
    axes.set_title(episode.title, fontsize=8)
    (line,) = axes.plot([], [], color="tab:blue")
    (dot,) = axes.plot([], [], "o", color="tab:red")
    frames = []
    for step in steps:
        line.set_data(*path[: step + 1].T)
        dot.set_data(*path[step : step + 1].T)
        frames.append(_snapshot(figure))
    return np.stack(frames)


def _blank(size: tuple[int, int], layout: str | None = None):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] / 100, size[1] / 100), dpi=100, layout=layout)
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _snapshot(figure) -> np.ndarray:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


# --- files --------------------------------------------------------------------------------------


def write_gif(path: pathlib.Path, frames: np.ndarray, seconds_per_frame: float) -> None:
    """Write frames as an endless gif (a gif's clock ticks in hundredths of a second)."""
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    duration = max(20, round(100 * seconds_per_frame) * 10)
    images[0].save(path, save_all=True, append_images=images[1:], duration=duration, loop=0)


def find_encoder() -> str | None:
    """Return an ffmpeg program: on the path, or the one imageio-ffmpeg brings."""
    if shutil.which("ffmpeg"):
        return shutil.which("ffmpeg")
    if importlib.util.find_spec("imageio_ffmpeg"):
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    return None


def write_mp4(path: pathlib.Path, frames: np.ndarray, fps: float, encoder: str) -> None:
    """Write frames as an mp4 that browsers play; InputError with the encoder's own words."""
    height, width = frames.shape[1:3]
    command = [
        encoder, "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24",
        "-s", f"{width}x{height}", "-r", f"{fps:g}", "-i", "-", "-pix_fmt", "yuv420p", str(path),
    ]  # fmt: skip
    done = subprocess.run(command, input=frames.tobytes(), capture_output=True)
    if done.returncode:
        raise InputError(f"{path}: the encoder {encoder} failed: {done.stderr.decode().strip()}")


def write_html(path: pathlib.Path, episode: Episode) -> None:
    """Write brax's interactive viewer of an episode, labelled as loading its script."""
    import types

    import mujoco

    with quiet_imports():
        from brax.base import Transform
        from brax.io import html, mjcf

        from envs.physics import asset_path

        text = pathlib.Path(asset_path(ROBOTS[episode.env].xml)).read_text()
        # Masses do not matter to a picture, and MuJoCo writes a warning file about this one.
        system = mjcf.loads(re.sub(r'settotalmass="[^"]*"', "", text))
    model, states = system.mj_model, []
    data = mujoco.MjData(model)
    for qpos in episode.qpos:
        data.qpos[:] = qpos
        mujoco.mj_kinematics(model, data)
        place = Transform(pos=data.xpos[1:].copy(), rot=data.xquat[1:].copy())
        states.append(types.SimpleNamespace(x=place, contact=None))
    page = html.render(system.tree_replace({"opt.timestep": episode.dt}), states)
    label = f"<p style='font-family:sans-serif'>{VIEWER_NOTE}</p>"
    path.write_text(page.replace("<body>", f"<body>{label}", 1))


def render(
    path: pathlib.Path, out: pathlib.Path, args, open_gl: bool, encoder: str | None
) -> tuple[Episode, list[pathlib.Path]]:
    """Write the pictures of one buffer file. -> the episode drawn, the files written."""
    episode = read_episode(path, args.episode)
    last = len(episode.positions) - 1 if episode.env in POINT_WORLDS else len(episode.qpos)
    stride = -(-last // args.max_frames)
    steps = np.arange(0, last, stride)
    frames = draw(episode, steps, (args.width, args.height), open_gl)
    written = [out / f"{path.stem}.gif"]
    write_gif(written[0], frames, stride * episode.dt)
    if encoder:
        written.append(out / f"{path.stem}.mp4")
        write_mp4(written[-1], frames, 1.0 / (stride * episode.dt), encoder)
    if args.html and episode.env in ROBOTS:
        written.append(out / f"{path.stem}.html")
        write_html(written[-1], episode)
    return episode, written


def render_together(files: list[pathlib.Path], out: pathlib.Path, args) -> pathlib.Path:
    """Write one gif of an episode of every file -> its path."""
    episodes = [read_episode(path, args.episode) for path in files]
    worlds = sorted({e.env for e in episodes})
    if len(worlds) > 1:
        raise InputError(f"--together: the buffers are of {', '.join(worlds)}. Remedy: name a run of one world")
    last = max(len(e.positions) for e in episodes) - 1
    stride = -(-last // args.max_frames)
    frames = draw_together(episodes, np.arange(0, last, stride), (args.width, args.height))
    path = out / "together.gif"
    write_gif(path, frames, stride * episodes[0].dt)
    return path


def main(argv: list[str] | None = None) -> int:
    """Command line: `python -m envs.render RUN`."""
    parser = argparse.ArgumentParser(prog="python -m envs.render", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", help="a run's folder, or a buffer file")
    parser.add_argument("--out", help="folder for the pictures (default: RUN/render)")
    parser.add_argument("--episode", default="best", help="best, last, or a number from 0")
    parser.add_argument("--max-frames", type=int, default=100, help="beyond, steps are skipped")
    parser.add_argument("--width", type=int, default=320, help="pixels, even")
    parser.add_argument("--height", type=int, default=240, help="pixels, even")
    parser.add_argument("--together", action="store_true", help="all policies of a run in one gif, together.gif")
    parser.add_argument("--html", action="store_true", help=f"brax's viewer too. {VIEWER_NOTE}")
    args = parser.parse_args(argv)
    try:
        return _run(args)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(args) -> int:
    if args.max_frames < 1 or args.width % 2 or args.height % 2:
        raise InputError("--max-frames must be at least 1, --width and --height even")
    files, encoder, open_gl = find_buffers(args.run), find_encoder(), open_gl_works()
    base = pathlib.Path(args.run)
    out = pathlib.Path(args.out or (base if base.is_dir() else base.parent) / "render")
    out.mkdir(parents=True, exist_ok=True)
    if not open_gl:
        print("no OpenGL here (Debian: apt install libegl1 libgl1-mesa-dri): robots as sticks")
    if not encoder:
        print("no video encoder (pip install imageio-ffmpeg): gif only")
    if args.together:
        written = render_together(files, out, args)
        print(f"{written}: {len(files)} policies, {written.stat().st_size / 1e6:.1f} MB")
        return 0
    for number, path in enumerate(files, start=1):
        print(f"[{number}/{len(files)}] {path.name} ...", flush=True)
        episode, written = render(path, out, args, open_gl, encoder)
        print(f"    {episode.title}: {', '.join(str(p) for p in written)}")
    if args.html:
        print(f"html: {VIEWER_NOTE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
