// The parts of the module _C.
#pragma once

#include <cxxabi.h>
#include <pybind11/pybind11.h>
#include <unistd.h>

#include <exception>
#include <string>

namespace gpt2f {

// Calls work() without the interpreter's lock. Not a scope guard: when the interpreter ends
// meanwhile, taking the lock back ends this thread by unwinding it, which a destructor would turn
// into an abort.
template <typename Work>
void without_gil(const Work& work) {
  std::exception_ptr thrown;
  PyThreadState* const state = PyEval_SaveThread();
  try {
    work();
  } catch (const std::exception&) {
    thrown = std::current_exception();
  }
#if defined(__GLIBCXX__)
  try {
    PyEval_RestoreThread(state);
  } catch (abi::__forced_unwind&) {  // unwinding would run destructors of Python objects: wait here
    for (;;) pause();
  }
#else
  PyEval_RestoreThread(state);
#endif
  if (thrown) std::rethrow_exception(thrown);
}

// GPT2_FAST_ISA and GPT2_FAST_THREADS, or the best this machine has and what it allows.
std::string default_isa();
int default_threads();

void bind_info(pybind11::module_& module);
void bind_ops(pybind11::module_& module);
void bind_engine(pybind11::module_& module);
void bind_quantize(pybind11::module_& module);
void bind_tokens(pybind11::module_& module);

}  // namespace gpt2f
