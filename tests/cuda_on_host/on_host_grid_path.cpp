#include "cuda/grid_path.cu"  // as C++: device.h takes its functions from this folder
