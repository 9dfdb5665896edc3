# libk25_tensorrt.so: the TensorRT plugins of the k25 operators. Included where TENSORRT_INCLUDE_DIR (the folder of
# NvInferRuntime.h, from TensorRT's own packages) is given. TensorRT's headers include CUDA's: CUDA_INCLUDE_DIR is the folder
# of cuda_runtime_api.h. Headers only: the library links neither TensorRT nor CUDA.
find_path(CUDA_INCLUDE_DIR cuda_runtime_api.h
          HINTS ${TENSORRT_INCLUDE_DIR} $ENV{CUDA_HOME}/include $ENV{CUDA_PATH}/include /usr/local/cuda/include)
if(NOT CUDA_INCLUDE_DIR)
  message(FATAL_ERROR "TensorRT's headers need cuda_runtime_api.h: give its folder with -DCUDA_INCLUDE_DIR=...")
endif()

add_library(k25_tensorrt SHARED adapters/tensorrt.cc adapters/tensorrt_op.cc core/checks.cc ${gpu})
target_include_directories(k25_tensorrt PRIVATE core adapters)
target_include_directories(k25_tensorrt SYSTEM PRIVATE ${TENSORRT_INCLUDE_DIR} ${CUDA_INCLUDE_DIR})
target_link_libraries(k25_tensorrt PRIVATE ${CMAKE_DL_LIBS})
target_compile_features(k25_tensorrt PRIVATE cxx_std_17)
# TensorRT may look at the classes behind its interfaces: run-time type information stays on.
target_compile_options(k25_tensorrt PRIVATE -Wall -Wextra)
set_target_properties(k25_tensorrt PROPERTIES CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
target_link_options(k25_tensorrt PRIVATE -Wl,--no-undefined -Wl,--exclude-libs,ALL)
if(K25_SANITIZE)
  target_compile_options(k25_tensorrt PRIVATE ${sanitizers} -O1 -g)
  target_link_options(k25_tensorrt PRIVATE ${sanitizers} -Wl,--undefined-version)
endif()
install(TARGETS k25_tensorrt LIBRARY DESTINATION ${CMAKE_CURRENT_SOURCE_DIR}/k25_plugins/native)
