# One object per instruction set, each with its own flags. Everything else is compiled for the
# baseline, so a machine without AVX never meets an AVX instruction by accident.

# gpt2f_add_isa(<name> [flag...]): compiles csrc/cpu/isa_<name>.cc with the flags and adds it to
# GPT2_FAST_ISA_TARGETS. csrc/cpu/select.cc chooses among them when the program runs.
macro(gpt2f_add_isa name)
  add_library(gpt2f_isa_${name} OBJECT csrc/cpu/isa_${name}.cc)
  target_link_libraries(gpt2f_isa_${name} PRIVATE gpt2f_options)
  # Kernels neither throw nor clean up: without exceptions no weak unwinding data either.
  target_compile_options(gpt2f_isa_${name} PRIVATE -fno-exceptions -fno-rtti ${ARGN})
  list(APPEND GPT2_FAST_ISA_TARGETS gpt2f_isa_${name})
endmacro()

# The instruction sets of the target architecture, in the order of select.cc.
macro(gpt2f_add_isas)
  set(GPT2_FAST_ISA_TARGETS)
  # Optimising harder takes 10 s longer and makes these kernels, the last resort, no faster to speak of.
  gpt2f_add_isa(scalar -O2)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    set(avx2 -mavx2 -mfma)
    set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512)
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
      # GCC's AVX-512 intrinsics read a variable that they leave undefined on purpose (bug 105593).
      list(APPEND avx512 -Wno-uninitialized -Wno-maybe-uninitialized)
    endif()
    gpt2f_add_isa(avx2 ${avx2})
    gpt2f_add_isa(avx2_vnni ${avx2} -mavxvnni)
    gpt2f_add_isa(avx512 ${avx512})
    gpt2f_add_isa(avx512_vnni ${avx512} -mavx512vnni)
    gpt2f_add_isa(avx512_bf16 ${avx512} -mavx512bf16 -mavx512vnni)
  elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
    gpt2f_add_isa(neon)
  endif()
endmacro()
