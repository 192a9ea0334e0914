# GPT2_FAST_SIMT=OFF|ON|ADDRESS: csrc/cuda compiled by the C++ compiler for the simulated device of
# csrc/simt, for tests on machines without a GPU. Never part of a wheel. ON makes two modules:
# race/_C.so reports every load and store of the kernels to the race checker. ADDRESS is under
# AddressSanitizer and UndefinedBehaviorSanitizer. Comes before cuda.cmake: there is one CUDA backend
# in a module.
set(GPT2_FAST_SIMT OFF CACHE STRING "Run the CUDA kernels on the CPU: OFF, ON or ADDRESS")
set_property(CACHE GPT2_FAST_SIMT PROPERTY STRINGS OFF ON ADDRESS)
if(NOT GPT2_FAST_SIMT MATCHES "^(OFF|ON|ADDRESS)$")
  message(FATAL_ERROR "GPT2_FAST_SIMT must be OFF, ON or ADDRESS, got '${GPT2_FAST_SIMT}'")
endif()
if(GPT2_FAST_SIMT)
  if(GPT2_FAST_CUDA STREQUAL "ON")
    message(FATAL_ERROR "GPT2_FAST_SIMT=${GPT2_FAST_SIMT} is a build without CUDA: "
                        "leave GPT2_FAST_CUDA at AUTO, or set it OFF.")
  endif()
  set(GPT2_FAST_CUDA OFF)
  if(GPT2_FAST_SIMT STREQUAL "ADDRESS")
    set(GPT2_FAST_SANITIZE "address;undefined")
  endif()
endif()

# gpt2f_add_race_checked(<target> <kernel>...): a second module, of the same objects but for the
# kernels.
macro(gpt2f_add_race_checked target)
  add_library(gpt2f_simt_race_kernels OBJECT ${ARGN})
  # As instrumentation only: the module is linked without it, csrc/simt/instrumentation.cc defines
  # what the compiler calls. Instrumented, GCC no longer sees that a unit without steps is never
  # read.
  target_compile_options(gpt2f_simt_race_kernels PRIVATE -fsanitize=thread -Wno-maybe-uninitialized
                         "SHELL:--param tsan-instrument-func-entry-exit=0")
  target_link_libraries(gpt2f_simt_race_kernels PRIVATE gpt2f_simt_options)
  add_library(gpt2f_race MODULE $<TARGET_OBJECTS:${target}>)
  target_link_libraries(gpt2f_race PRIVATE gpt2f_options gpt2f_core gpt2f_cpu gpt2f_engine
                        ${GPT2_FAST_ISA_TARGETS} gpt2f_simt gpt2f_simt_host gpt2f_simt_race_kernels
                        ${CMAKE_DL_LIBS})
  set_target_properties(gpt2f_race PROPERTIES
    PREFIX "" OUTPUT_NAME ${target} LINKER_LANGUAGE CXX
    LIBRARY_OUTPUT_DIRECTORY ${CMAKE_LIBRARY_OUTPUT_DIRECTORY}/race)
endmacro()

# gpt2f_add_simt(<target>): links csrc/simt and, compiled for it, csrc/cuda into the target. Nothing
# where GPT2_FAST_SIMT is OFF.
macro(gpt2f_add_simt target)
  if(GPT2_FAST_SIMT)
    set(GPT2_FAST_CUDA_NOTE "simulated CUDA device (GPT2_FAST_SIMT=${GPT2_FAST_SIMT})")
    add_library(gpt2f_simt_options INTERFACE)
    target_compile_definitions(gpt2f_simt_options INTERFACE GPT2_FAST_SIMT)
    # -g1: errors and races name lines. nvcc's pragmas mean nothing here.
    target_compile_options(gpt2f_simt_options INTERFACE -g1 -Wno-unknown-pragmas)
    target_include_directories(gpt2f_simt_options
                               INTERFACE ${CMAKE_CURRENT_SOURCE_DIR}/csrc/simt/include)
    target_link_libraries(gpt2f_simt_options INTERFACE gpt2f_options)

    file(GLOB sources CONFIGURE_DEPENDS csrc/simt/*.cc)
    add_library(gpt2f_simt OBJECT ${sources})
    target_link_libraries(gpt2f_simt PRIVATE gpt2f_simt_options)

    file(GLOB sources CONFIGURE_DEPENDS csrc/cuda/*.cc csrc/simt/python/*.cc)
    add_library(gpt2f_simt_host OBJECT ${sources})
    target_link_libraries(gpt2f_simt_host PRIVATE gpt2f_simt_options pybind11::module)
    gpt2f_unite(gpt2f_simt_host)

    file(GLOB sources CONFIGURE_DEPENDS csrc/cuda/*.cu)
    set_source_files_properties(${sources} PROPERTIES LANGUAGE CXX)
    add_library(gpt2f_simt_kernels OBJECT ${sources})
    target_link_libraries(gpt2f_simt_kernels PRIVATE gpt2f_simt_options)

    # The kernels last: of an inline function that others also have, their instrumented copy must
    # not be the one that stays.
    target_link_libraries(${target} PRIVATE gpt2f_simt gpt2f_simt_host gpt2f_simt_kernels
                                            ${CMAKE_DL_LIBS})
    target_compile_definitions(${target} PRIVATE GPT2_FAST_CUDA_BACKEND GPT2_FAST_SIMT)
    set_target_properties(${target} PROPERTIES SUFFIX .so) # never beside an installed module
    if(GPT2_FAST_SIMT STREQUAL "ON")
      gpt2f_add_race_checked(${target} ${sources})
    endif()
  endif()
endmacro()
