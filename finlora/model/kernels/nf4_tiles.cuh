// NF4 weights with double quantisation, in the tiles of finlora/model/kernels/nf4.py; compiled in front of the files that read them.
//
// A tile is 32 outputs by 256 columns, its bytes in the order in which a warp reads them: each load gives every lane 16 bytes, its
// operands for products of 16 outputs and 64 columns. A group of 64 columns of an output shares a scale,
// level_code[level] * level_scale + mean; the levels, one byte a group, come last.

constexpr int LANES = 32;
constexpr int OUT_TILES = 2, OUTS = OUT_TILES * 16, GROUPS = 4, COLUMNS = GROUPS * 64;  // of a tile
constexpr int HALVES = 2, HALF_GROUPS = GROUPS / HALVES, HALF_BYTES = OUTS * HALF_GROUPS * 32;
constexpr int LEVEL_OFFSET = HALVES * HALF_BYTES, TILE_STRIDE = LEVEL_OFFSET + OUTS * GROUPS;
constexpr int PAIRS = 256, NESTED = 64 * 256;  // weights that share a level's scale

// One lane's part of half a tile: operands for products of 16 outputs and 64 columns each.
struct Half {
    uint4 bytes[OUT_TILES][HALF_GROUPS];
};

__device__ void load_half(Half& half, const unsigned char* from) {
    const uint4* own = reinterpret_cast<const uint4*>(from) + threadIdx.x % LANES;
#pragma unroll
    for (int m = 0; m < OUT_TILES; m++)
#pragma unroll
        for (int group = 0; group < HALF_GROUPS; group++) half.bytes[m][group] = __ldcs(own + (m * HALF_GROUPS + group) * LANES);
    __syncwarp();  // keeps the loads here: the compiler would move them to the use of the weights
}

// Returns the levels of the lane's output.
__device__ unsigned load_levels(const unsigned char* tile) {
    return __ldcs(reinterpret_cast<const unsigned*>(tile + LEVEL_OFFSET) + threadIdx.x % LANES);
}
