"""Hands the build of `gpt2_fast._C` to CMake and ninja. All choices are CMake cache variables.

Environment: CMAKE_ARGS (words added to the configure command), GPT2_FAST_CUDA (AUTO, ON or OFF),
CMAKE_BUILD_PARALLEL_LEVEL (compile jobs; 2 unless set). docs/install.md lists what each one does.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class CleanBuildPy(build_py):
    """Starts from an empty staging folder, so that no deleted file of an older build gets in."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Builds in build/<platform>-<python>, where objects stay from one run to the next."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        folder = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        # The cache names tools in pip's deleted build environment, and options of the last run.
        (folder / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DGPT2_FAST_CUDA={os.environ.get('GPT2_FAST_CUDA', 'AUTO')}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(min(2, os.cpu_count() or 1))
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(folder), "--parallel", jobs], check=True)


setup(
    ext_modules=[Extension("gpt2_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": CleanBuildPy},
)
