// The attention kernels, defined in attention.cpp and listed in the table of layers.cpp.
#pragma once
#include "gmtp/layers.h"

namespace gmtp::GMTP_ISA {
void store_key(KvType type, const float* key, int64_t dim, int position, void* page);
void store_value(KvType type, const float* value, int64_t dim, int position, void* page);
void attend_chunk(KvType type, const float* q, int queries, int64_t dim, const KvChunk& chunk, const int* first, const int* last,
                  float* scratch, Partial* partial, float* out);
void merge(Partial* running, float* out, const Partial* next, const float* x, int64_t dim);
}  // namespace gmtp::GMTP_ISA
