// W (N, K) in bfloat16 from the tiles of finlora/model/kernels/nf4_tiles.cuh: each value times its scale, rounded once, as in
// bitsandbytes. A warp takes a tile. Launched by finlora/model/kernels/nf4_products.py. Defined at compilation: WARPS of a block.
static_assert(LANES * WARPS == PAIRS, "a thread copies the value of one level");

extern "C" __global__ void __launch_bounds__(LANES * WARPS)
unpack_nf4(const unsigned char* tiles, const float* level_code, const float* level_scales, const float* means, const float* code,
           bf16* target, int num_out, int num_in) {
    __shared__ float own_code[PAIRS], numbers[16];
    own_code[threadIdx.x] = level_code[threadIdx.x];
    if (threadIdx.x < 16) numbers[threadIdx.x] = code[threadIdx.x];
    __syncthreads();
    const int lane = threadIdx.x % LANES, num_columns = num_in / COLUMNS;
    const int column = blockIdx.x * WARPS + threadIdx.x / LANES, strip = blockIdx.y;
    if (column >= num_columns) return;
    const unsigned char* from = tiles + (static_cast<long long>(strip) * num_columns + column) * TILE_STRIDE;
    Half halves[HALVES];
    load_half(halves[0], from);
    load_half(halves[1], from + HALF_BYTES);
    const unsigned levels = load_levels(from);
    const int own = min(strip * OUTS + lane, num_out - 1);
    const float factor = __ldg(level_scales + (static_cast<unsigned>(own) * num_in + column * COLUMNS) / NESTED);
    const float mean = __ldg(means + own);
    float scales[GROUPS];
#pragma unroll
    for (int group = 0; group < GROUPS; group++)  // rounded before the mean is added, as in bitsandbytes
        scales[group] = __fadd_rn(__fmul_rn(own_code[levels >> 8 * group & 0xff], factor), mean);
#pragma unroll
    for (int m = 0; m < OUT_TILES; m++)
#pragma unroll
        for (int group = 0; group < GROUPS; group++)
#pragma unroll
            for (int eight = 0; eight < 2; eight++) {
                const int row = m * 16 + eight * 8 + (lane >> 2), out = strip * OUTS + row;
                const float scale = __shfl_sync(0xffffffff, scales[group], row);
                const uint4 four = halves[group / HALF_GROUPS].bytes[m][group % HALF_GROUPS];
                const unsigned words[4] = {four.x, four.y, four.z, four.w};
                unsigned found[8];
#pragma unroll
                for (int pair = 0; pair < 8; pair++) {
                    const unsigned byte = words[pair / 2] >> (8 * (pair % 2 * 2 + eight)) & 0xff;
                    found[pair] = round_two(numbers[byte >> 4] * scale, numbers[byte & 15] * scale);
                }
                // Neighbouring lanes swap halves, so that their writes are contiguous.
                const bool is_odd = lane & 1;
#pragma unroll
                for (int pair = 0; pair < 4; pair++) {
                    const unsigned other = __shfl_xor_sync(0xffffffff, is_odd ? found[pair] : found[4 + pair], 1);
                    if (is_odd) found[pair] = other;
                    else found[4 + pair] = other;
                }
                if (out >= num_out) continue;
                bf16* line = target + static_cast<long long>(out) * num_in + column * COLUMNS + group * 64;
                uint4* to = reinterpret_cast<uint4*>(line) + (lane & 2) * 2 + (lane & 1);
                to[0] = make_uint4(found[0], found[1], found[2], found[3]);
                to[2] = make_uint4(found[4], found[5], found[6], found[7]);
            }
}
