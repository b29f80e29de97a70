#include "cuda/rows.cu"  // as C++: device.h takes its functions from this folder
