"""Replays the damaged files through the native parser under AddressSanitizer and UBSan, without Python around it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from .damaged import DAMAGED
from .gguf_files import STRING, File, array, tensor

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def replayer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cmake") is None or not (ROOT / "CMakeLists.txt").is_file():
        pytest.skip("needs cmake and the source tree")
    build = tmp_path_factory.mktemp("sanitized")
    options = ["-DGMTP_SANITIZE=ON", "-DGMTP_TESTS=ON", "-DGMTP_PYTHON=OFF"]
    subprocess.run(["cmake", "-S", ROOT, "-B", build, *options], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", build, "--target", "fuzz_gguf"], check=True, stdout=subprocess.DEVNULL)
    return build / "native" / "tests" / "fuzz_gguf"


def test_no_damaged_file_makes_the_parser_read_out_of_bounds(replayer: Path, tmp_path: Path) -> None:
    valid = bytes(
        File(pairs=[array("texts", STRING, ["a", "né"])], tensors=[tensor("a", [32, 2], 2, 0)], data=bytes(36))
    )
    files = [data for data, _ in DAMAGED.values()] + [valid[:length] for length in range(len(valid) + 1)]
    paths = []
    for number, data in enumerate(files):
        paths.append(tmp_path / str(number))
        paths[-1].write_bytes(data)
    # Finding leaks needs ptrace, which containers may forbid; the parser owns nothing but standard containers.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    ran = subprocess.run([replayer, *paths], capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == f"{len(files)} files replayed\n"
