# GPT2_FAST_CUDA=AUTO|ON|OFF. Looks for nvcc, never for a GPU: a build machine has no need of one.
# Sets GPT2_FAST_CUDA_VERSION ("" is a CPU build) and GPT2_FAST_CUDA_NOTE, which `gpt2-fast info`
# prints, so that nobody mistakes a CPU build for a CUDA build.

# gpt2f_find_nvcc(<result> <searched>): the path of nvcc or "", and what was searched, in words.
function(gpt2f_find_nvcc result searched)
  set(folders)
  set(words "CMAKE_CUDA_COMPILER (${CMAKE_CUDA_COMPILER})")
  foreach(variable IN ITEMS CUDA_HOME CUDA_PATH)
    string(APPEND words ", ${variable} ($ENV{${variable}})")
    if(NOT "$ENV{${variable}}" STREQUAL "")
      list(APPEND folders "$ENV{${variable}}/bin")
    endif()
  endforeach()
  find_program(nvcc_on_path nvcc NO_CACHE)
  string(APPEND words ", PATH")
  if(NOT Python_EXECUTABLE)
    find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)
  endif()
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import sysconfig; print(sysconfig.get_path('purelib'))"
    OUTPUT_VARIABLE site
    OUTPUT_STRIP_TRAILING_WHITESPACE)
  file(GLOB wheels "${site}/nvidia/*/bin/nvcc")
  string(APPEND words ", NVIDIA's Python packages (${site}/nvidia/*/bin)")
  find_program(nvcc_in_folders nvcc PATHS ${folders} NO_DEFAULT_PATH NO_CACHE)
  set(found "")
  foreach(candidate IN ITEMS ${CMAKE_CUDA_COMPILER} ${nvcc_in_folders} ${nvcc_on_path} ${wheels})
    if(NOT found AND EXISTS "${candidate}")
      set(found "${candidate}")
    endif()
  endforeach()
  set(${result} "${found}" PARENT_SCOPE)
  set(${searched} "${words}" PARENT_SCOPE)
endfunction()

set(GPT2_FAST_CUDA_VERSION "")
if(GPT2_FAST_CUDA STREQUAL "OFF")
  set(GPT2_FAST_CUDA_NOTE "CPU build (GPT2_FAST_CUDA=OFF)")
elseif(GPT2_FAST_CUDA STREQUAL "AUTO")
  set(GPT2_FAST_CUDA_NOTE "CPU build: this version has no CUDA kernels yet (GPT2_FAST_CUDA=AUTO)")
elseif(GPT2_FAST_CUDA STREQUAL "ON")
  gpt2f_find_nvcc(nvcc searched)
  if(NOT nvcc)
    message(FATAL_ERROR "GPT2_FAST_CUDA=ON needs nvcc, which was not found. Searched: ${searched}. "
                        "Set CUDA_HOME, or GPT2_FAST_CUDA=OFF for a CPU build.")
  endif()
  message(FATAL_ERROR "GPT2_FAST_CUDA=ON found ${nvcc}, but gpt2_fast ${GPT2_FAST_VERSION} has no "
                      "CUDA kernels yet. Use GPT2_FAST_CUDA=AUTO or OFF for a CPU build.")
else()
  message(FATAL_ERROR "GPT2_FAST_CUDA must be AUTO, ON or OFF, got '${GPT2_FAST_CUDA}'")
endif()
message(STATUS "gpt2_fast ${GPT2_FAST_VERSION}: ${GPT2_FAST_CUDA_NOTE}")
