"""Settings every test shares."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys

import hypothesis

# Another build of the native module, for example csrc/cuda compiled for the host, in place of the
# installed one.
if native := os.environ.get("GPT2_FAST_NATIVE"):
    spec = importlib.util.spec_from_file_location("gpt2_fast._C", native)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["gpt2_fast._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["gpt2_fast._C"])

# A shell that starts a run in the background has it ignore Ctrl-C, and so all its children; some
# tests are about Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests run on shared machines: a slow example is no failure. CI repeats the same examples each
# time, so that a red run can be repeated; elsewhere every run looks at new ones.
hypothesis.settings.register_profile(
    "ci", deadline=None, derandomize=True, print_blob=True, max_examples=25
)
hypothesis.settings.register_profile("dev", deadline=None, print_blob=True, max_examples=25)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")
