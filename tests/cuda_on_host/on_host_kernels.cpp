// The CUDA kernels as C++: device.h then takes its functions from the shim beside this file.
#include "cuda/rows.cu"
#include "cuda/step_path.cu"
