# GPT2_FAST_CUDA=AUTO|ON|OFF. Looks for nvcc, never for a GPU: a build machine has no need of one.
# Sets GPT2_FAST_CUDA_VERSION ("" is a CPU build) and GPT2_FAST_CUDA_NOTE, which `gpt2-fast info`
# prints, so that nobody mistakes a CPU build for a CUDA build.

set(GPT2_FAST_CUDA_RUNTIME static CACHE STRING "CUDA runtime: static (in the module) or shared")
set(GPT2_FAST_CUDA_OLDEST 12.0) # C++20

# gpt2f_find_nvcc(<result> <searched>): the path of nvcc or "", and what was searched, in words.
function(gpt2f_find_nvcc result searched)
  set(found "")
  set(words "CMAKE_CUDA_COMPILER (${CMAKE_CUDA_COMPILER})")
  if(CMAKE_CUDA_COMPILER)
    find_program(candidate NAMES ${CMAKE_CUDA_COMPILER} NO_CACHE)
    if(NOT candidate)
      message(FATAL_ERROR "CMAKE_CUDA_COMPILER=${CMAKE_CUDA_COMPILER} does not exist")
    endif()
    set(found "${candidate}")
  endif()
  foreach(variable IN ITEMS CUDA_HOME CUDA_PATH)
    string(APPEND words ", ${variable} ($ENV{${variable}})")
    if(NOT found AND EXISTS "$ENV{${variable}}/bin/nvcc")
      set(found "$ENV{${variable}}/bin/nvcc")
    endif()
  endforeach()
  find_program(nvcc_on_path nvcc NO_CACHE NO_CMAKE_SYSTEM_PATH)
  string(APPEND words ", PATH")
  if(NOT found AND nvcc_on_path)
    set(found "${nvcc_on_path}")
  endif()
  # purelib as well as sys.path: in pip's isolated build it is the environment that pip runs in.
  if(NOT Python_EXECUTABLE)
    find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)
  endif()
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
            "import sys, sysconfig; print(sysconfig.get_path('purelib'), *sys.path[1:], sep=';')"
    OUTPUT_VARIABLE sites
    OUTPUT_STRIP_TRAILING_WHITESPACE)
  list(TRANSFORM sites APPEND "/nvidia/cu*/bin/nvcc")
  list(GET sites 0 pattern)
  string(APPEND words ", NVIDIA's Python packages (${pattern})")
  file(GLOB wheels ${sites})
  if(NOT found AND wheels)
    list(GET wheels 0 found)
  endif()
  set(${result} "${found}" PARENT_SCOPE)
  set(${searched} "${words}" PARENT_SCOPE)
endfunction()

# gpt2f_nvcc_version(<nvcc> <version>): as "13.0.88", or "" where it cannot be run.
function(gpt2f_nvcc_version nvcc version)
  execute_process(COMMAND ${nvcc} --version OUTPUT_VARIABLE text ERROR_QUIET)
  string(REGEX MATCH "V([0-9]+\\.[0-9]+\\.[0-9]+)" matched "${text}")
  set(${version} "${CMAKE_MATCH_1}" PARENT_SCOPE)
endfunction()

# gpt2f_default_architectures(<nvcc> <result>): machine code for every generation this nvcc knows,
# and PTX, which a driver compiles for processors newer than this list: of the oldest generation that
# has all instructions the kernels use, and of the newest.
function(gpt2f_default_architectures nvcc result)
  execute_process(COMMAND ${nvcc} --list-gpu-arch OUTPUT_VARIABLE known)
  set(kept)
  foreach(number IN ITEMS 75 80 86 89 90 100 120)
    if(known MATCHES "compute_${number}[^0-9]")
      list(APPEND kept ${number})
    else()
      message(STATUS "CUDA: ${nvcc} does not know sm_${number}: left out")
    endif()
  endforeach()
  list(GET kept -1 newest)
  set(virtual 80-virtual ${newest}-virtual)
  list(REMOVE_DUPLICATES virtual)
  list(TRANSFORM kept APPEND -real)
  set(${result} ${kept} ${virtual} PARENT_SCOPE)
endfunction()

# gpt2f_try_nvcc(<nvcc> <result>): "" if it compiles with this C++ compiler, else what it says. A
# toolkit that is older than the compiler would stop even those who want a CPU build.
function(gpt2f_try_nvcc nvcc result)
  set(host ${CMAKE_CXX_COMPILER})
  if(CMAKE_CUDA_HOST_COMPILER)
    set(host ${CMAKE_CUDA_HOST_COMPILER})
  elseif(NOT "$ENV{CUDAHOSTCXX}" STREQUAL "")
    set(host $ENV{CUDAHOSTCXX})
  endif()
  set(source ${CMAKE_CURRENT_BINARY_DIR}/try_nvcc.cu)
  file(WRITE ${source} "#include <cstdint>\n__global__ void kernel(int32_t* x) { *x = 1; }\n")
  execute_process(COMMAND ${nvcc} -std=c++20 -ccbin ${host} -c ${source} -o ${source}.o
                  RESULT_VARIABLE failed OUTPUT_VARIABLE said ERROR_VARIABLE said)
  if(failed)
    string(STRIP "${failed} ${said}" said)
    set(${result} "${said}" PARENT_SCOPE)
  else()
    set(${result} "" PARENT_SCOPE)
  endif()
endfunction()

set(GPT2_FAST_CUDA_VERSION "")
set(GPT2_FAST_CUDA_NVCC "")
if(NOT GPT2_FAST_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "GPT2_FAST_CUDA must be AUTO, ON or OFF, got '${GPT2_FAST_CUDA}'")
endif()
if(NOT GPT2_FAST_CUDA_RUNTIME MATCHES "^(static|shared)$")
  message(FATAL_ERROR "GPT2_FAST_CUDA_RUNTIME must be static or shared, "
                      "got '${GPT2_FAST_CUDA_RUNTIME}'")
endif()
if(GPT2_FAST_CUDA STREQUAL "OFF")
  set(GPT2_FAST_CUDA_NOTE "CPU build (GPT2_FAST_CUDA=OFF)")
else()
  gpt2f_find_nvcc(GPT2_FAST_CUDA_NVCC searched)
  if(GPT2_FAST_CUDA_NVCC)
    gpt2f_nvcc_version(${GPT2_FAST_CUDA_NVCC} nvcc_version)
  endif()
  if(NOT GPT2_FAST_CUDA_NVCC)
    set(reason "needs nvcc, which was not found. Searched: ${searched}. Set CUDA_HOME")
    set(GPT2_FAST_CUDA_NOTE "CPU build: no nvcc found while building (GPT2_FAST_CUDA=AUTO)")
  elseif(NOT nvcc_version)
    set(reason "found ${GPT2_FAST_CUDA_NVCC}, which cannot be run")
    set(GPT2_FAST_CUDA_NOTE "CPU build: nvcc could not be run (GPT2_FAST_CUDA=AUTO)")
  elseif(nvcc_version VERSION_LESS GPT2_FAST_CUDA_OLDEST)
    set(reason "needs CUDA ${GPT2_FAST_CUDA_OLDEST} or newer, but ${GPT2_FAST_CUDA_NVCC} is \
${nvcc_version}")
    set(GPT2_FAST_CUDA_NOTE
        "CPU build: nvcc ${nvcc_version} is older than ${GPT2_FAST_CUDA_OLDEST} (GPT2_FAST_CUDA=AUTO)")
  else()
    gpt2f_try_nvcc(${GPT2_FAST_CUDA_NVCC} reason)
    if(reason)
      message(STATUS "CUDA: ${reason}")
      set(reason "found ${GPT2_FAST_CUDA_NVCC}, which does not compile with this C++ compiler: \
${reason}. Set CUDAHOSTCXX to one that it takes")
      set(GPT2_FAST_CUDA_NOTE "CPU build: nvcc ${nvcc_version} does not work with the C++ compiler \
(GPT2_FAST_CUDA=AUTO)")
    else()
      string(REGEX MATCH "^[0-9]+\\.[0-9]+" GPT2_FAST_CUDA_VERSION "${nvcc_version}")
    endif()
  endif()
  if(reason AND GPT2_FAST_CUDA STREQUAL "ON")
    message(FATAL_ERROR "GPT2_FAST_CUDA=ON ${reason}, or GPT2_FAST_CUDA=OFF for a CPU build.")
  endif()
endif()

if(GPT2_FAST_CUDA_VERSION)
  message(STATUS "CUDA: ${GPT2_FAST_CUDA_NVCC} (GPT2_FAST_CUDA=OFF builds for the CPU alone)")
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND "$ENV{CUDAARCHS}" STREQUAL "")
    gpt2f_default_architectures(${GPT2_FAST_CUDA_NVCC} CMAKE_CUDA_ARCHITECTURES)
  endif()
  set(CMAKE_CUDA_COMPILER ${GPT2_FAST_CUDA_NVCC})
  if(NOT DEFINED CMAKE_CUDA_HOST_COMPILER AND "$ENV{CUDAHOSTCXX}" STREQUAL "")
    set(CMAKE_CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER})
  endif()
  # NVIDIA's Python packages have lib where nvcc looks in lib64: CMake's test program would not link.
  execute_process(COMMAND ${GPT2_FAST_CUDA_NVCC} -v __root ERROR_VARIABLE words OUTPUT_QUIET)
  string(REGEX MATCH "TOP=([^\r\n]*)" matched "${words}")
  get_filename_component(GPT2_FAST_CUDA_ROOT "${CMAKE_MATCH_1}" ABSOLUTE)
  set(append_flags "$ENV{NVCC_APPEND_FLAGS}")
  set(ENV{NVCC_APPEND_FLAGS} "${append_flags} -L${GPT2_FAST_CUDA_ROOT}/lib")
  enable_language(CUDA)
  set(ENV{NVCC_APPEND_FLAGS} "${append_flags}")
  if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION) # CMake 3.22 knows none beyond 17 for nvcc
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
  endif()
  string(REGEX REPLACE "([0-9]+[af]?)-virtual" "PTX \\1" targets "${CMAKE_CUDA_ARCHITECTURES}")
  string(REGEX REPLACE "(^|;)([0-9]+[af]?)(-real)?" "\\1sm_\\2" targets "${targets}")
  list(JOIN targets ", " targets)
  set(GPT2_FAST_CUDA_NOTE "CUDA ${GPT2_FAST_CUDA_VERSION} for ${targets}")
endif()
message(STATUS "gpt2_fast ${GPT2_FAST_VERSION}: ${GPT2_FAST_CUDA_NOTE}")

# The runtime is linked by its path, not by CMake: packages from PyPI have no libcudart.so to name.
macro(gpt2f_link_cuda_runtime target)
  set(folders ${GPT2_FAST_CUDA_ROOT}/lib64 ${GPT2_FAST_CUDA_ROOT}/lib
              ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES})
  string(REGEX MATCH "^[0-9]+" major ${GPT2_FAST_CUDA_VERSION})
  if(GPT2_FAST_CUDA_RUNTIME STREQUAL "shared")
    set(names libcudart.so.${major} libcudart.so)
    # Beside an installed module lie the libraries of NVIDIA's packages. LD_LIBRARY_PATH goes first.
    target_link_options(${target} PRIVATE -Wl,--enable-new-dtags
                        "-Wl,-rpath,$ORIGIN/../nvidia/cu${major}/lib")
  else()
    set(names libcudart_static.a)
  endif()
  find_file(cuda_runtime NAMES ${names} PATHS ${folders} NO_DEFAULT_PATH NO_CACHE)
  if(NOT cuda_runtime)
    message(FATAL_ERROR "The CUDA runtime was not found: no ${names} in ${folders}. From PyPI: "
                        "pip install 'nvidia-cuda-runtime==${GPT2_FAST_CUDA_VERSION}.*'")
  endif()
  target_link_libraries(${target} PRIVATE ${cuda_runtime} ${CMAKE_DL_LIBS} rt)
  set_target_properties(${target} PROPERTIES CUDA_RUNTIME_LIBRARY None LINKER_LANGUAGE CXX)
endmacro()

# gpt2f_add_cuda(<target>): compiles csrc/cuda and links it into the target. Nothing on a CPU build.
macro(gpt2f_add_cuda target)
  if(GPT2_FAST_CUDA_VERSION)
    # Host code by the C++ compiler, under the same options as everything else.
    file(GLOB sources CONFIGURE_DEPENDS csrc/cuda/*.cc)
    add_library(gpt2f_cuda_host OBJECT ${sources})
    target_include_directories(gpt2f_cuda_host SYSTEM
                               PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
    target_link_libraries(gpt2f_cuda_host PRIVATE gpt2f_options)

    # Kernels by nvcc. -fmad=false for the reason that stands in CMakeLists.txt: the same source
    # must give the same bits in every kernel that includes it. Kernels may call what csrc/core
    # declares constexpr, and core needs to know nothing of CUDA for it.
    file(GLOB sources CONFIGURE_DEPENDS csrc/cuda/*.cu)
    add_library(gpt2f_cuda OBJECT ${sources})
    set_target_properties(gpt2f_cuda PROPERTIES CUDA_STANDARD 20 CUDA_VISIBILITY_PRESET hidden
                                                CUDA_RUNTIME_LIBRARY None)
    target_include_directories(gpt2f_cuda PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}/csrc)
    target_compile_options(
      gpt2f_cuda PRIVATE -fmad=false --expt-relaxed-constexpr
                         -Xcompiler=-Wall,-Wextra,-ffp-contract=off,-fno-strict-aliasing
                         -Xcompiler=-ffile-prefix-map=${CMAKE_CURRENT_SOURCE_DIR}=.)
    # For tools that read or run PTX.
    if(GPT2_FAST_CUDA_RUNTIME STREQUAL "shared" AND CMAKE_CUDA_ARCHITECTURES MATCHES
                                                    "^[0-9]+-virtual$")
      target_compile_options(gpt2f_cuda PRIVATE --no-compress)
    elseif(GPT2_FAST_CUDA_VERSION VERSION_GREATER_EQUAL 13)
      # A third off the wheel; every driver that runs CUDA 13 reads it.
      target_compile_options(gpt2f_cuda PRIVATE --compress-mode=size)
    endif()
    target_link_libraries(${target} PRIVATE gpt2f_cuda_host gpt2f_cuda)
    target_compile_definitions(${target} PRIVATE GPT2_FAST_CUDA_BACKEND)
    gpt2f_link_cuda_runtime(${target})
  endif()
endmacro()
