#include "cuda/gemm_path.cu"  // as C++: device.h takes its functions from this folder
