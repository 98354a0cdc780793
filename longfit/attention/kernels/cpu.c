// The two passes of a selector on the CPU: scores of all keys, and the places of the highest.
//
// Scores of keys from packed 2-bit codes, by tables of sixteen in a register (the way of FAISS' 4-bit fast scan,
// André et al. 2017, here in fp32 and exact): four bits of a key are two codes, and the sum of what the two are worth
// to a query stands in one of sixteen lanes. Sixteen keys take one shuffle and one addition for two channels.

#include <immintrin.h>
#include <stdint.h>

#define KEYS 16   // lanes of a register
#define GROUPS 4  // registers of keys that share the loading of a table
#define SAMPLE 2048

typedef const float *Tables;  // [rows][2 * width][16]

// Dwords `word` to `word + 3` of sixteen keys that lie `width` bytes apart. Lane 4 i + j of out[w] is key 4 j + i.
static inline __attribute__((always_inline)) void load(const uint8_t *codes, long width, __m512i out[4]) {
    __m512i four[4];
    for (int j = 0; j < 4; j++) {
        const uint8_t *at = codes + 4 * j * width;
        __m512i keys = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)at));
        keys = _mm512_inserti32x4(keys, _mm_loadu_si128((const __m128i *)(at + width)), 1);
        keys = _mm512_inserti32x4(keys, _mm_loadu_si128((const __m128i *)(at + 2 * width)), 2);
        four[j] = _mm512_inserti32x4(keys, _mm_loadu_si128((const __m128i *)(at + 3 * width)), 3);
    }
    __m512i low01 = _mm512_unpacklo_epi32(four[0], four[1]), high01 = _mm512_unpackhi_epi32(four[0], four[1]);
    __m512i low23 = _mm512_unpacklo_epi32(four[2], four[3]), high23 = _mm512_unpackhi_epi32(four[2], four[3]);
    out[0] = _mm512_unpacklo_epi64(low01, low23);
    out[1] = _mm512_unpackhi_epi64(low01, low23);
    out[2] = _mm512_unpacklo_epi64(high01, high23);
    out[3] = _mm512_unpackhi_epi64(high01, high23);
}

// Scores of GROUPS * KEYS keys for `rows` query rows; `rows` is known when this is compiled.
static inline __attribute__((always_inline)) void block(
    const int rows, const uint8_t *codes, long width, Tables tables, float *scores, long stride) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512 sums[4][GROUPS];
    for (int r = 0; r < rows; r++)
        for (int g = 0; g < GROUPS; g++) sums[r][g] = _mm512_setzero_ps();
    for (long byte = 0; byte < width; byte += 16) {
        __m512i words[GROUPS][4];
        for (int g = 0; g < GROUPS; g++) load(codes + g * KEYS * width + byte, width, words[g]);
        for (int w = 0; w < 4; w++) {
            __m512i now[GROUPS];
            for (int g = 0; g < GROUPS; g++) now[g] = words[g][w];
            for (int nibble = 0; nibble < 8; nibble++) {
                for (int r = 0; r < rows; r++) {
                    __m512 table = _mm512_loadu_ps(tables + ((r * width + byte + 4 * w) * 2 + nibble) * 16);
                    for (int g = 0; g < GROUPS; g++)  // a shuffle looks at the lowest four bits of a lane
                        sums[r][g] = _mm512_add_ps(sums[r][g], _mm512_permutexvar_ps(now[g], table));
                }
                for (int g = 0; g < GROUPS; g++) now[g] = _mm512_srli_epi32(now[g], 4);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int g = 0; g < GROUPS; g++)
            _mm512_storeu_ps(scores + r * stride + g * KEYS, _mm512_permutexvar_ps(order, sums[r][g]));
}

static void one(const uint8_t *codes, long width, Tables tables, float *score) {
    float sum = 0;
    for (long byte = 0; byte < width; byte++)
        sum += tables[byte * 32 + (codes[byte] & 15)] + tables[byte * 32 + 16 + (codes[byte] >> 4)];
    *score = sum;
}

// codes: `keys` rows of `width` bytes, a multiple of 16. tables: [rows][2 * width][16]. scores: [rows][keys].
void longfit_scan(const uint8_t *codes, long keys, long width, Tables tables, long rows, float *scores) {
    const long step = GROUPS * KEYS, whole = keys / step * step, row_tables = width * 32;
    for (long key = 0; key < whole; key += step) {
        const uint8_t *at = codes + key * width;
        long row = 0;
        for (; row + 4 <= rows; row += 4)
            block(4, at, width, tables + row * row_tables, scores + row * keys + key, keys);
        Tables rest = tables + row * row_tables;
        float *to = scores + row * keys + key;
        if (rows - row == 3) block(3, at, width, rest, to, keys);
        if (rows - row == 2) block(2, at, width, rest, to, keys);
        if (rows - row == 1) block(1, at, width, rest, to, keys);
    }
    for (long key = whole; key < keys; key++)
        for (long row = 0; row < rows; row++)
            one(codes + key * width, width, tables + row * row_tables, scores + row * keys + key);
}

// Floats as integers of the same order; NaN comes first, as in torch.topk, and both zeros are one.
static inline uint32_t ordered(float value) {
    uint32_t bits;
    value += 0.0f;
    __builtin_memcpy(&bits, &value, 4);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The k-th largest of n integers, digit by digit.
static uint32_t kth(const uint32_t *values, long n, long k) {
    uint32_t prefix = 0, mask = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        long counts[256] = {0};
        for (long i = 0; i < n; i++)
            if ((values[i] & mask) == prefix) counts[values[i] >> shift & 255]++;
        int digit = 255;
        while (counts[digit] < k) k -= counts[digit--];
        prefix |= (uint32_t)digit << shift;
        mask |= 255u << shift;
    }
    return prefix;
}

// Scores that are not below the bound, and their places; returns how many.
static long gather(const float *scores, long n, float bound, uint32_t *values, int32_t *places) {
    const __m512 bounds = _mm512_set1_ps(bound);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    long found = 0, i = 0;
    for (; i + 16 <= n; i += 16) {
        __mmask16 high = _mm512_cmp_ps_mask(_mm512_loadu_ps(scores + i), bounds, _CMP_NLT_UQ);
        if (!high) continue;
        __m512i at = _mm512_add_epi32(lanes, _mm512_set1_epi32((int)i));
        _mm512_storeu_si512(places + found, _mm512_maskz_compress_epi32(high, at));
        found += __builtin_popcount(high);
    }
    for (; i < n; i++)
        if (!(scores[i] < bound)) places[found++] = (int32_t)i;
    for (long j = 0; j < found; j++) values[j] = ordered(scores[places[j]]);
    return found;
}

// The places of the k largest of n scores, ascending; of equal ones the first. A sample of the scores gives a bound
// that leaves little more than k to look at; where it leaves fewer, all are looked at.
// values and places: room for n + 16 numbers each.
static void top(const float *scores, long n, long k, uint32_t *values, int32_t *places, int64_t *chosen) {
    float bound = -__builtin_inff();
    long apart = n / SAMPLE, sampled = 0;
    if (apart > 1) {
        for (long i = apart / 2; i < n; i += apart) values[sampled++] = ordered(scores[i]);
        double rank = (double)k * sampled / n;
        long safe = (long)(rank + 4 * __builtin_sqrt(rank) + 4);
        if (safe < sampled) {
            uint32_t bits = kth(values, sampled, safe);
            bits = bits & 0x80000000u ? bits & 0x7fffffffu : ~bits;
            __builtin_memcpy(&bound, &bits, 4);
        }
    }
    long found = gather(scores, n, bound, values, places);
    if (found < k) found = gather(scores, n, -__builtin_inff(), values, places);
    uint32_t last = kth(values, found, k);
    long equal = k;
    for (long j = 0; j < found; j++) equal -= values[j] > last;
    for (long j = 0; j < found; j++) {
        if (values[j] < last || (values[j] == last && equal-- <= 0)) continue;
        *chosen++ = places[j];
    }
}

// scores: [rows][n]; chosen: [rows][k]; work: room for 2 (n + 16) numbers of four bytes.
void longfit_top(const float *scores, long rows, long n, long k, uint32_t *work, int64_t *chosen) {
    for (long row = 0; row < rows; row++)
        top(scores + row * n, n, k, work, (int32_t *)(work + n + 16), chosen + row * k);
}
