// In place of a header that only a torch with CUDA installs, so that the sources which include its
// CUDA headers can be compiled, though not linked, with any torch.
#pragma once
