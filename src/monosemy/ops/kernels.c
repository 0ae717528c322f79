/* The compiled CPU form of the ops. reference.py says what each of them means; cpu.py allocates, and calls what is not static here.

   B tokens, D d_in, F latents, N entries, R bags, S SAEs. Every sum is taken in an order that the data alone decide, so that results
   are the same for any number of threads. */

#include <float.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline)) /* what is constant for a caller is constant within */
#define EACH_ROW _Pragma("omp parallel for schedule(dynamic, 16) num_threads(threads)")

INLINE int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }

/* --- numbers as keys: integers of the same order, so that no comparison is undefined for a NaN ------------------------------------ */

INLINE float at(const void *x, int bf16, int64_t i)
{
    if (!bf16)
        return ((const float *)x)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)x)[i] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE const void *row_of(const void *x, int bf16, int64_t F, int64_t b) { return (const char *)x + b * F * (bf16 ? 2 : 4); }

INLINE int32_t flipped(int32_t bits) { return bits ^ (int32_t)((uint32_t)(bits >> 31) >> 1); }

INLINE int32_t key_of(float value)
{
    int32_t bits;
    value += 0.0f; /* -0 becomes 0 */
    memcpy(&bits, &value, sizeof bits);
    return flipped(bits);
}

INLINE float value_of(int32_t key)
{
    int32_t bits = flipped(key);
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE int64_t count_from(const int32_t *keys, int64_t n, int32_t least)
{
    int64_t total = 0;
    for (int64_t i = 0; i < n; i += 4096) {
        int32_t count = 0;
        for (int64_t j = i; j < least_of(n, i + 4096); j++)
            count += keys[j] >= least;
        total += count;
    }
    return total;
}

/* A key that at least k of n keys reach, and at most `enough` unless they are equal. With enough = k that is the k-th largest, or a
   key between it and the next. */
static int32_t reached_by(const int32_t *keys, int64_t n, int64_t k, int64_t enough)
{
    int32_t low = INT32_MAX, high = INT32_MIN;
    for (int64_t i = 0; i < n; i++) {
        low = keys[i] < low ? keys[i] : low;
        high = keys[i] > high ? keys[i] : high;
    }
    for (int64_t count = n; low < high && count > enough;) {
        int32_t middle = (int32_t)(low + ((int64_t)high - low + 1) / 2);
        int64_t from_middle = count_from(keys, n, middle);
        if (from_middle < k)
            high = middle - 1;
        else
            low = middle, count = from_middle;
    }
    return low;
}

/* --- sums of rows ------------------------------------------------------------------------------------------------------------------- */

#if defined(__AVX512F__)
#define WIDE 64
#elif defined(__AVX__)
#define WIDE 32
#else
#define WIDE 16
#endif
#define LANES ((int64_t)(WIDE / sizeof(float)))
typedef float Lanes __attribute__((vector_size(WIDE)));
typedef float Unaligned __attribute__((vector_size(WIDE), aligned(4), may_alias));

INLINE Lanes load(const float *x) { return *(const Unaligned *)x; }
INLINE void store(float *x, Lanes value) { *(Unaligned *)x = value; }

INLINE float total(Lanes x)
{
    float sum = 0;
    for (int64_t i = 0; i < LANES; i++)
        sum += x[i];
    return sum;
}

/* Entries in some order, each with a coefficient and a row. */
typedef struct {
    const int32_t *order; /* NULL: as they come */
    const int32_t *at;    /* the row of each entry */
    const float *coefficients, *rows;
    int64_t D, N;
} Rows;

INLINE int64_t place(Rows e, int64_t i) { return e.order ? e.order[i] : i; }

/* Over `few` entries (at most 4) from i: sum += coefficient * row, and dots = w . row at each entry's place. sum or w may be NULL. */
INLINE void add_few(Rows e, int64_t i, int few, float *restrict sum, const float *restrict w, float *restrict dots)
{
    const float *rows[4], *next[4];
    float coefficients[4] = {0}, rest[4] = {0};
    Lanes products[4] = {{0}};
    int64_t d = 0;
    for (int j = 0; j < few; j++) {
        rows[j] = e.rows + e.at[place(e, i + j)] * e.D;
        next[j] = e.rows + e.at[place(e, least_of(i + j + few, e.N - 1))] * e.D; /* fetched into the cache meanwhile */
        if (sum)
            coefficients[j] = e.coefficients[place(e, i + j)];
    }
    for (; d + LANES <= e.D; d += LANES) {
        Lanes added = {0};
        for (int j = 0; j < few; j++) {
            Lanes row = load(rows[j] + d);
            __builtin_prefetch(next[j] + d);
            if (sum)
                added += coefficients[j] * row;
            if (w)
                products[j] += load(w + d) * row;
        }
        if (sum)
            store(sum + d, load(sum + d) + added);
    }
    for (; d < e.D; d++)
        for (int j = 0; j < few; j++) {
            if (sum)
                sum[d] += coefficients[j] * rows[j][d];
            if (w)
                rest[j] += w[d] * rows[j][d];
        }
    for (int j = 0; w && j < few; j++)
        dots[place(e, i + j)] = total(products[j]) + rest[j];
}

INLINE void add(Rows e, int64_t from, int64_t to, float *sum, const float *w, float *dots)
{
    if (sum)
        memset(sum, 0, sizeof *sum * e.D);
    for (; from + 4 <= to; from += 4)
        add_few(e, from, 4, sum, w, dots);
    for (; from < to; from++)
        add_few(e, from, 1, sum, w, dots);
}

/* --- the encoder's product, estimated: rows of 16-bit integers, in a product of which two numbers are multiplied where float32 has room
   for one. Selections look up exactly what the estimate leaves open ---------------------------------------------------------------- */

#if defined(__AVX512BW__)
#define INTS 16 /* sums in a vector */
#define TILE 12 /* tokens whose sums are held in registers at once */
typedef __m512i Ints;
#define EACH_TWO(pair) _mm512_set1_epi32(pair)
#if defined(__AVX512VNNI__)
#define ADD_PRODUCTS(sum, a, b) __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b))
#else
#define ADD_PRODUCTS(sum, a, b) __asm__("vpaddd %1, %0, %0" : "+v"(sum) : "v"(_mm512_madd_epi16(a, b)))
#endif
#elif defined(__AVX2__) && WIDE == 32
#define INTS 8
#define TILE 6
typedef __m256i Ints;
#define EACH_TWO(pair) _mm256_set1_epi32(pair)
#define ADD_PRODUCTS(sum, a, b) __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(_mm256_madd_epi16(a, b)))
#endif

#if defined(INTS)
typedef Ints UnalignedInts __attribute__((aligned(2), may_alias));
enum { PANEL = 2 * INTS, TOKENS = 96, LATENTS = 1024 }; /* latents that a tile has; tokens and latents of a task */
#else
enum { PANEL = 1 };
#endif

/* How many rows of W_enc are interleaved; 0 where there is no estimated product. */
int64_t panel(int64_t threads)
{
    (void)threads;
    return PANEL > 1 ? PANEL : 0;
}

#define NORM 32000.0f /* of a quantized row: no sum of products of two rows, nor a part of one, leaves 32 bits (Cauchy and Schwarz) */

/* Rows, times a number for each column, as integers times a unit for each row. Two columns lie together, of `interleaved` rows side by
   side: [R / interleaved, D / 2, interleaved, 2], zero where there is no row or column. Norms are of the rows, and of what rounding took.
   `out` may be NULL. */
void quantize(const float *rows, const float *columns, int64_t R, int64_t D, int64_t interleaved, int16_t *out, float *units, float *norms,
              float *errors, int64_t threads)
{
    int64_t pairs = (D + 1) / 2, groups = (R + interleaved - 1) / interleaved;
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
    for (int64_t group = 0; group < groups; group++)
        for (int64_t lane = 0; lane < interleaved; lane++) {
            int64_t r = group * interleaved + lane;
            const float *row = rows + (r < R ? r : 0) * D;
            int16_t *to = out ? out + (group * pairs * interleaved + lane) * 2 : NULL;
            float square = 0, lost = 0;
#pragma omp simd reduction(+ : square)
            for (int64_t d = 0; d < D; d++)
                square += row[d] * columns[d] * (row[d] * columns[d]);
            float norm = r < R ? sqrtf(square) : 0, unit = norm / NORM, inverse = norm > 0 && norm <= FLT_MAX ? NORM / norm : 0;
            if (!inverse)
                unit = 0;
            for (int64_t from = 0; from < 2 * pairs; from += 64) {
                int64_t n = least_of(64, 2 * pairs - from), known = least_of(64, D - from);
                int16_t whole[64] = {0};
                float off = 0;
#pragma omp simd reduction(+ : off)
                for (int64_t i = 0; i < known; i++) {
                    float value = row[from + i] * columns[from + i], nearest = rintf(value * inverse);
                    whole[i] = (int16_t)(int32_t)nearest;
                    off += (value - unit * nearest) * (value - unit * nearest);
                }
                lost += off;
                for (int64_t i = 0; to && i < n; i += 2)
                    memcpy(to + (from + i) * interleaved, whole + i, 4);
            }
            if (r < R)
                units[r] = unit, norms[r] = norm, errors[r] = sqrtf(lost);
        }
}

#if defined(INTS)
/* Of a few tokens and a panel of latents the sums of products, [tokens, PANEL]. */
INLINE void tile(const int16_t *x, const int16_t *w, int64_t pairs, int64_t tokens, int32_t *out)
{
    Ints sums[TILE][2];
#pragma GCC unroll 16
    for (int64_t b = 0; b < tokens; b++)
        sums[b][0] = sums[b][1] = (Ints){0};
    for (int64_t d = 0; d < pairs; d++, w += 2 * PANEL) {
        Ints first = *(const UnalignedInts *)w, second = *(const UnalignedInts *)(w + PANEL);
#pragma GCC unroll 16
        for (int64_t b = 0; b < tokens; b++) {
            int32_t pair;
            memcpy(&pair, x + 2 * (b * pairs + d), 4);
            Ints each = EACH_TWO(pair);
            ADD_PRODUCTS(sums[b][0], each, first);
            ADD_PRODUCTS(sums[b][1], each, second);
        }
    }
#pragma GCC unroll 16
    for (int64_t b = 0; b < tokens; b++) {
        *(UnalignedInts *)(out + b * PANEL) = sums[b][0];
        *(UnalignedInts *)(out + b * PANEL + INTS) = sums[b][1];
    }
}

typedef void Tile(const int16_t *x, const int16_t *w, int64_t pairs, int32_t *out);
__attribute__((noinline)) static Tile whole_tile, one_token; /* where nothing else wants the registers */
static void whole_tile(const int16_t *x, const int16_t *w, int64_t pairs, int32_t *out) { tile(x, w, pairs, TILE, out); }
static void one_token(const int16_t *x, const int16_t *w, int64_t pairs, int32_t *out) { tile(x, w, pairs, 1, out); }
#endif

/* x W^T + b of what `quantize` made of x and W, [B, F]. */
void estimate(const int16_t *x, const float *x_units, const int16_t *W, const float *W_units, const float *bias, int64_t B, int64_t D,
              int64_t F, float *out, int64_t threads)
{
#if defined(INTS)
    int64_t pairs = (D + 1) / 2;
#pragma omp parallel for collapse(2) schedule(dynamic, 1) num_threads(threads)
    for (int64_t b_from = 0; b_from < B; b_from += TOKENS)
        for (int64_t f_from = 0; f_from < F; f_from += LATENTS)
            for (int64_t f = f_from; f < least_of(F, f_from + LATENTS); f += PANEL) {
                int64_t n = least_of(PANEL, F - f), b_to = least_of(B, b_from + TOKENS), tokens;
                float units[PANEL] = {0}, biases[PANEL] = {0};
                memcpy(units, W_units + f, sizeof(float) * (size_t)n);
                memcpy(biases, bias + f, sizeof(float) * (size_t)n);
                for (int64_t b = b_from; b < b_to; b += tokens) {
                    int32_t sums[TILE * PANEL];
                    tokens = b + TILE <= b_to ? TILE : 1;
                    (tokens == TILE ? whole_tile : one_token)(x + 2 * pairs * b, W + 2 * pairs * f, pairs, sums);
                    for (int64_t i = 0; i < tokens; i++) {
                        float values[PANEL];
                        for (int64_t j = 0; j < PANEL; j++)
                            values[j] = (float)sums[i * PANEL + j] * (x_units[b + i] * units[j]) + biases[j];
                        memcpy(out + (b + i) * F + f, values, sizeof(float) * (size_t)(n == PANEL ? PANEL : n));
                    }
                }
            }
#endif
}

/* What makes an estimate exact: by how much it may be off for each token and, beside that, of its own size; and the product's operands.
   `error` is NULL of exact values. */
typedef struct {
    const float *error;
    float relative;
    const float *x, *W, *bias;
    int64_t D;
} Exactly;

/* The least key that a token's estimate may have where the exact value reaches one whose estimate `bound` may be off by `off`. */
INLINE int32_t lowered(Exactly e, int64_t b, int32_t bound, float off)
{
    float value = value_of(bound);
    return e.error ? key_of(value - (e.error[b] + off + 2 * e.relative * fabsf(value))) : bound;
}

/* The exact pre-activations of a token at n latents. Always four at once, so that a latent's value is the same whatever others are asked
   for. */
static void look_up(Exactly e, int64_t b, const int32_t *latents, int64_t n, float *values)
{
    const float *x = e.x + b * e.D;
    for (int64_t i = 0; i < n; i += 4) {
        const float *rows[4], *next[4];
        Lanes sums[4] = {{0}};
        int64_t d = 0, rest = e.D % LANES;
        for (int64_t j = 0; j < 4; j++) {
            rows[j] = e.W + latents[least_of(i + j, n - 1)] * e.D;
            next[j] = e.W + latents[least_of(i + j + 4, n - 1)] * e.D; /* fetched into the cache meanwhile */
        }
        for (; d < e.D - rest; d += LANES)
            for (int64_t j = 0; j < 4; j++) {
                __builtin_prefetch(next[j] + d);
                sums[j] += load(x + d) * load(rows[j] + d);
            }
        for (int64_t j = 0; j < 4 && rest; j++) {
            float ends[2][LANES] = {{0}};
            memcpy(ends[0], x + d, sizeof(float) * (size_t)rest);
            memcpy(ends[1], rows[j] + d, sizeof(float) * (size_t)rest);
            sums[j] += load(ends[0]) * load(ends[1]);
        }
        for (int64_t j = 0; j < least_of(4, n - i); j++)
            values[i + j] = total(sums[j]) + e.bias[latents[i + j]];
    }
}

static void keys_of(const float *values, int64_t n, int32_t *keys)
{
    for (int64_t i = 0; i < n; i++)
        keys[i] = key_of(values[i]);
}

/* --- selections: a row is looked at in groups of up to 64 latents. The k-th largest of the groups' maxima bounds the k largest values
   from below, and most groups lie under it ------------------------------------------------------------------------------------------ */

INLINE int32_t greatest(const void *x, int bf16, int64_t from, int64_t n)
{
    int32_t most = INT32_MIN;
    for (int64_t i = from; i < from + n; i++) {
        int32_t key = key_of(at(x, bf16, i));
        most = key > most ? key : most;
    }
    return most;
}

INLINE void maxima(const void *x, int bf16, int64_t F, int64_t width, int32_t *most)
{
    for (int64_t from = 0; from < F; from += width)
        *most++ = width == 64 && from + 64 <= F ? greatest(x, bf16, from, 64) : greatest(x, bf16, from, least_of(width, F - from));
}

/* A bit for each of 64 flags that are 0 or 1. */
INLINE uint64_t packed(uint8_t flags[64])
{
    uint64_t bits = 0;
    __asm__("" : "+m"(*(uint8_t(*)[64])flags)); /* read from memory eight at a time, not from registers one by one */
    for (int i = 0; i < 8; i++) {
        uint64_t eight;
        memcpy(&eight, flags + 8 * i, 8);
        bits |= (eight * 0x0102040810204080u >> 56) << 8 * i;
    }
    return bits;
}

INLINE uint64_t reaching(const void *x, int bf16, int64_t from, int64_t n, int32_t least)
{
    uint8_t flags[64] = {0};
    for (int64_t i = 0; i < n; i++)
        flags[i] = key_of(at(x, bf16, from + i)) >= least;
    return packed(flags);
}

/* The latents and keys of a row that are above `bound`, and the first `ties` of those that equal it. Returns how many. */
INLINE int64_t gather(const void *x, int bf16, int64_t F, int64_t width, const int32_t *most, int32_t bound, int64_t ties,
                      int32_t *latents, int32_t *keys)
{
    int64_t n = 0;
    for (int64_t from = 0; from < F; from += width, most++) {
        if (*most < bound || (*most == bound && ties <= 0))
            continue;
        int whole = width == 64 && from + 64 <= F;
        uint64_t bits = whole ? reaching(x, bf16, from, 64, bound) : reaching(x, bf16, from, least_of(width, F - from), bound);
        for (; bits; bits &= bits - 1) {
            int64_t i = from + __builtin_ctzll(bits);
            int32_t key = key_of(at(x, bf16, i));
            if (key > bound || ties-- > 0)
                latents[n] = (int32_t)i, keys[n++] = key;
        }
    }
    return n;
}

/* Of n candidates those above `bound`, and the first `ties` of those that equal it. */
INLINE void keep(const int32_t *latents, const int32_t *keys, int64_t n, int32_t bound, int64_t ties, int32_t *kept, float *values)
{
    for (int64_t i = 0; i < n; i++)
        if (keys[i] > bound || (keys[i] == bound && ties-- > 0))
            *kept++ = latents[i], *values++ = value_of(keys[i]);
}

/* Drop candidates below `least`. Returns how many are left. */
INLINE int64_t kept_from(int32_t *latents, const int32_t *keys, int64_t n, int32_t least)
{
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i++)
        latents[kept] = latents[i], kept += keys[i] >= least;
    return kept;
}

INLINE void top_k_row(const void *x, int bf16, int64_t F, int64_t k, int64_t width, const int32_t *among, Exactly e, int64_t b,
                      int32_t *scratch, int32_t *latents, float *values)
{
    int64_t groups = (F + width - 1) / width;
    int32_t *most = scratch, *candidates = most + groups, *keys = candidates + F;
    maxima(x, bf16, F, width, most);
    int32_t bound = lowered(e, b, reached_by(most, groups, k, k + k / 16), e.error ? e.error[b] : 0);
    int64_t n = gather(x, bf16, F, width, most, bound, F, candidates, keys);
    for (int64_t i = 0; among && i < n; i++)
        candidates[i] = among[candidates[i]];
    if (e.error) {
        float *exact = (float *)(keys + F);
        n = kept_from(candidates, keys, n, lowered(e, b, reached_by(keys, n, k, k), e.error[b]));
        look_up(e, b, candidates, n, exact);
        keys_of(exact, n, keys);
    }
    bound = reached_by(keys, n, k, k);
    int64_t above = bound < INT32_MAX ? count_from(keys, n, bound + 1) : 0;
    keep(candidates, keys, n, bound, k - above, latents, values);
}

/* The k largest of each token; those of the latents `among` where it is given, of which there are M >= k. Each thread has
   groups + 4 M of scratch. */
void top_k(const void *pre, int64_t bf16, int64_t B, int64_t F, int64_t k, int64_t width, const int32_t *among, int64_t M,
           const Exactly *exactly, int32_t *scratch, int32_t *latents, float *values, int64_t threads)
{
    int64_t groups = (M + width - 1) / width;
    Exactly e = *exactly;
#pragma omp parallel num_threads(threads)
    {
        int32_t *mine = scratch + omp_get_thread_num() * (groups + 4 * M);
        float *gathered = (float *)(mine + groups + 3 * M);
#pragma omp for schedule(dynamic, 16)
        for (int64_t b = 0; b < B; b++) {
            const void *x = row_of(pre, bf16, F, b);
            if (among) {
                for (int64_t i = 0; i < M; i++)
                    gathered[i] = bf16 ? at(x, 1, among[i]) : at(x, 0, among[i]);
                top_k_row(gathered, 0, M, k, width, among, e, b, mine, latents + b * k, values + b * k);
            } else if (bf16)
                top_k_row(x, 1, F, k, width, NULL, e, b, mine, latents + b * k, values + b * k);
            else
                top_k_row(x, 0, F, k, width, NULL, e, b, mine, latents + b * k, values + b * k);
        }
    }
}

/* What a row has above the bound and equal to it, and what it may take, so that n are taken in all and the earliest of equals. */
typedef struct {
    int64_t above, equal, begin, ties;
} Share;

static void shared_out(Share *shares, int64_t B, int64_t n)
{
    int64_t ties = n, begin = 0;
    for (int64_t b = 0; b < B; b++)
        ties -= shares[b].above;
    for (int64_t b = 0; b < B; b++) {
        Share *s = shares + b;
        s->begin = begin;
        s->ties = least_of(ties, s->equal);
        ties -= s->ties;
        begin += s->above + s->ties;
    }
    shares[B].begin = begin;
}

INLINE Share counted(const void *x, int bf16, int64_t F, int64_t width, const int32_t *most, int32_t bound)
{
    Share share = {0};
    for (int64_t from = 0; from < F; from += width, most++)
        if (*most >= bound) {
            int32_t above = 0, equal = 0;
            for (int64_t i = from; i < least_of(from + width, F); i++) {
                int32_t key = key_of(at(x, bf16, i));
                above += key > bound;
                equal += key == bound;
            }
            share.above += above, share.equal += equal;
        }
    return share;
}

/* The maxima of all rows' groups [B, groups], for each row a bound of what it may have among the n largest, and what it has above that.
   Returns how many those are: where they are fewer than n, the bound is the n-th largest itself. */
int64_t batch_bound(const void *pre, int64_t bf16, int64_t B, int64_t F, int64_t n, int64_t width, const Exactly *exactly, int32_t *most,
                    int32_t *bounds, Share *shares, int64_t threads)
{
    int64_t groups = (F + width - 1) / width, total = 0;
    float off = 0;
    for (int64_t b = 0; exactly->error && b < B; b++)
        off = fmaxf(off, exactly->error[b]);
    EACH_ROW for (int64_t b = 0; b < B; b++)
    {
        const void *x = row_of(pre, bf16, F, b);
        bf16 ? maxima(x, 1, F, width, most + b * groups) : maxima(x, 0, F, width, most + b * groups);
    }
    int32_t bound = reached_by(most, B * groups, n, n + n / 16);
    EACH_ROW for (int64_t b = 0; b < B; b++)
    {
        const void *x = row_of(pre, bf16, F, b);
        const int32_t *here = most + b * groups;
        bounds[b] = lowered(*exactly, b, bound, off);
        shares[b] = bf16 ? counted(x, 1, F, width, here, bounds[b]) : counted(x, 0, F, width, here, bounds[b]);
    }
    for (int64_t b = 0; b < B; b++)
        total += shares[b].above;
    return total;
}

/* From what batch_bound found: M >= n candidates, and the n largest of them. Of an estimate `exact` has M places. */
void batch_top_k(const void *pre, int64_t bf16, int64_t B, int64_t F, int64_t n, int64_t width, const int32_t *most, const int32_t *bounds,
                 Share *shares, int64_t M, const Exactly *exactly, float *exact, int32_t *candidates, int32_t *keys, int32_t *latents,
                 int32_t *starts, float *values, int64_t threads)
{
    int64_t groups = (F + width - 1) / width;
    Exactly e = *exactly;
    shared_out(shares, B, M);
    EACH_ROW for (int64_t b = 0; b < B; b++)
    {
        const void *x = row_of(pre, bf16, F, b);
        const int32_t *here = most + b * groups;
        Share s = shares[b];
        int64_t found = bf16 ? gather(x, 1, F, width, here, bounds[b], s.ties, candidates + s.begin, keys + s.begin)
                             : gather(x, 0, F, width, here, bounds[b], s.ties, candidates + s.begin, keys + s.begin);
        if (e.error) {
            look_up(e, b, candidates + s.begin, found, exact + s.begin);
            keys_of(exact + s.begin, found, keys + s.begin);
        }
    }
    int32_t least = reached_by(keys, M, n, n);
    Share *ends = shares + B + 1;
    EACH_ROW for (int64_t b = 0; b < B; b++)
    {
        Share share = {0};
        for (int64_t i = shares[b].begin; i < shares[b + 1].begin; i++) {
            share.above += keys[i] > least;
            share.equal += keys[i] == least;
        }
        ends[b] = share;
    }
    shared_out(ends, B, n);
    EACH_ROW for (int64_t b = 0; b < B; b++)
    {
        int64_t from = shares[b].begin, to = ends[b].begin;
        keep(candidates + from, keys + from, shares[b + 1].begin - from, least, ends[b].ties, latents + to, values + to);
        starts[b] = (int32_t)to;
    }
    starts[B] = (int32_t)n;
}

INLINE uint64_t above_thresholds(const void *x, int bf16, int64_t from, int64_t n, const float *thresholds, float off)
{
    uint8_t flags[64] = {0};
    for (int64_t i = 0; i < n; i++)
        flags[i] = at(x, bf16, from + i) > thresholds[from + i] - off;
    return packed(flags);
}

INLINE int64_t mask_row(const void *x, int bf16, int64_t F, const float *thresholds, float off, uint64_t *mask)
{
    int64_t count = 0;
    for (int64_t from = 0; from < F; from += 64, mask++) {
        int whole = from + 64 <= F;
        *mask = whole ? above_thresholds(x, bf16, from, 64, thresholds, off) : above_thresholds(x, bf16, from, F - from, thresholds, off);
        count += __builtin_popcountll(*mask);
    }
    return count;
}

/* A bit for each place that is, or by its estimate may be, above its latent's threshold, [B, ceil(F / 64)], and where each token's begin.
   Returns how many there are. */
int64_t above_mask(const void *pre, int64_t bf16, int64_t B, int64_t F, const float *thresholds, const Exactly *exactly, uint64_t *mask,
                   int32_t *starts, int64_t threads)
{
    int64_t words = (F + 63) / 64, total = 0;
    EACH_ROW for (int64_t b = 0; b < B; b++)
    {
        const void *x = row_of(pre, bf16, F, b);
        uint64_t *here = mask + b * words;
        float off = exactly->error ? exactly->error[b] : 0;
        starts[b] = (int32_t)(bf16 ? mask_row(x, 1, F, thresholds, off, here) : mask_row(x, 0, F, thresholds, off, here));
    }
    for (int64_t b = 0; b <= B; b++) {
        int64_t count = b < B ? starts[b] : 0;
        starts[b] = (int32_t)total;
        total += count;
    }
    return total;
}

/* The latents and values where the mask is set. */
void above(const void *pre, int64_t bf16, int64_t B, int64_t F, const uint64_t *mask, const int32_t *starts, const Exactly *exactly,
           int32_t *latents, float *values, int64_t threads)
{
    int64_t words = (F + 63) / 64;
    Exactly e = *exactly;
    EACH_ROW for (int64_t b = 0; b < B; b++)
    {
        const void *x = row_of(pre, bf16, F, b);
        int64_t n = starts[b];
        for (int64_t word = 0; word < words; word++)
            for (uint64_t bits = mask[b * words + word]; bits; bits &= bits - 1, n++) {
                int64_t i = 64 * word + __builtin_ctzll(bits);
                latents[n] = (int32_t)i;
                values[n] = at(x, bf16, i);
            }
        if (e.error)
            look_up(e, b, latents + starts[b], n - starts[b], values + starts[b]);
    }
}

/* --- sums over entries ------------------------------------------------------------------------------------------------------------ */

/* A stable counting sort by latent. Each part of the entries is counted by itself, [parts, F]. */
void group(const int32_t *latents, int64_t N, int64_t F, int64_t parts, int32_t *counts, int32_t *order, int32_t *starts, int64_t threads)
{
    memset(counts, 0, sizeof *counts * parts * F);
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int t = 0; t < parts; t++)
        for (int64_t i = N * t / parts; i < N * (t + 1) / parts; i++)
            counts[t * F + latents[i]]++;
    int32_t begin = 0;
    for (int64_t f = 0; f < F; f++) {
        starts[f] = begin;
        for (int t = 0; t < parts; t++) {
            int32_t count = counts[t * F + f];
            counts[t * F + f] = begin;
            begin += count;
        }
    }
    starts[F] = begin;
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int t = 0; t < parts; t++)
        for (int64_t i = N * t / parts; i < N * (t + 1) / parts; i++)
            order[counts[t * F + latents[i]]++] = (int32_t)i;
}

void sum_by_latent(const float *values, const int32_t *order, const int32_t *starts, int64_t F, float *sums, int64_t threads)
{
#pragma omp parallel for schedule(dynamic, 256) num_threads(threads)
    for (int64_t f = 0; f < F; f++) {
        double sum = 0;
        for (int64_t i = starts[f]; i < starts[f + 1]; i++)
            sum += values[order[i]];
        sums[f] = (float)sum;
    }
}

void decode(const float *values, const float *W, const int32_t *latents, const int32_t *starts, int64_t R, int64_t D, float *out,
            int64_t threads)
{
    Rows entries = {NULL, latents, values, W, D, starts[R]};
    EACH_ROW for (int64_t r = 0; r < R; r++)
        add(entries, starts[r], starts[r + 1], out + r * D, NULL, NULL);
}

INLINE void add_row(const float *restrict row, float *restrict sum, int64_t D)
{
    for (int64_t d = 0; d < D; d++)
        sum[d] += row[d];
}

INLINE void add_latent(Rows e, int64_t from, int64_t to, float *sum, const float *w, float *dots)
{
    if (sum && w)
        add(e, from, to, sum, w, dots);
    else if (sum)
        add(e, from, to, sum, NULL, NULL);
    else
        add(e, from, to, NULL, w, dots);
}

/* For each latent, over its entries: sums [F, D] of coefficient times the bag's row, and dots [N] of its own row of W with the bag's.
   Where `sums` or W is NULL they are left out; with `adds` the sums are added to what is there. A latent of more than `size` entries is
   summed in chunks of them, and so by several threads: `chunks` has the latent and the first entry of each, at most 2 N / size. `partial`
   has a row for each chunk, and one for each thread. */
void by_latent(const int32_t *order, const int32_t *starts, const int32_t *bags, int64_t F, int64_t D, const float *coefficients,
               const float *rows, const float *W, float *sums, int64_t adds, float *dots, int64_t size, float *partial,
               int32_t (*chunks)[2], int64_t threads)
{
    Rows entries = {order, bags, coefficients, rows, D, starts[F]};
    const int64_t block = 16; /* latents */
    int64_t n_chunks = 0, n_blocks = (F + block - 1) / block;
    for (int64_t f = 0; f < F; f++)
        if (starts[f + 1] - starts[f] > size)
            for (int64_t from = starts[f]; from < starts[f + 1]; from += size, n_chunks++)
                chunks[n_chunks][0] = (int32_t)f, chunks[n_chunks][1] = (int32_t)from;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t task = 0; task < n_chunks + n_blocks; task++)
        if (task < n_chunks) {
            int64_t f = chunks[task][0], from = chunks[task][1], to = least_of(from + size, starts[f + 1]);
            add_latent(entries, from, to, sums ? partial + task * D : NULL, W ? W + f * D : NULL, dots);
        } else
            for (int64_t f = (task - n_chunks) * block; f < least_of(F, (task - n_chunks + 1) * block); f++)
                if (starts[f + 1] - starts[f] <= size && (!adds || starts[f + 1] > starts[f])) {
                    float *mine = adds ? partial + (n_chunks + omp_get_thread_num()) * D : sums ? sums + f * D : NULL;
                    add_latent(entries, starts[f], starts[f + 1], mine, W ? W + f * D : NULL, dots);
                    if (adds)
                        add_row(mine, sums + f * D, D);
                }
    if (!sums)
        return;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t first = 0; first < n_chunks; first++) {
        int64_t f = chunks[first][0];
        if (chunks[first][1] != starts[f])
            continue;
        float *sum = partial + first * D;
        for (int64_t chunk = first + 1; chunk < n_chunks && chunks[chunk][0] == f; chunk++)
            add_row(partial + chunk * D, sum, D);
        if (adds)
            add_row(sum, sums + f * D, D);
        else
            memcpy(sums + f * D, sum, sizeof *sum * D);
    }
}

/* --- the update: a parameter of S SAEs is [S, total] in rows of C, the last of which may be shorter; constrained ones have whole rows - */

enum { FREE, PROJECT, CONSTRAIN, ROWS = 32 };

/* How much of p the gradient has along it. */
INLINE float radial(const float *p, const float *g, int64_t C, int constraint)
{
    float along = 0, square = 0;
#pragma omp simd reduction(+ : along, square)
    for (int64_t c = 0; c < C; c++)
        along += g[c] * p[c], square += p[c] * p[c];
    float norm = sqrtf(square) + (constraint == PROJECT ? 1e-6f : 0);
    return along / norm / norm;
}

INLINE double square_norm(const float *p, const float *g, int64_t C, int constraint)
{
    float sum = 0, away = constraint ? radial(p, g, C, constraint) : 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < C; c++) {
        float left = constraint ? g[c] - away * p[c] : g[c];
        sum += left * left;
    }
    return sum;
}

/* `partial` is [S, blocks of ROWS rows]. */
void square_norms(const float *p, const float *const *grads, int64_t S, int64_t total, int64_t C, int64_t constraint, double *partial,
                  float *squares, int64_t threads)
{
    int64_t blocks = (total + ROWS * C - 1) / (ROWS * C);
#pragma omp parallel for collapse(2) schedule(dynamic, 4) num_threads(threads)
    for (int64_t s = 0; s < S; s++)
        for (int64_t block = 0; block < blocks; block++) {
            double sum = 0;
            for (int64_t i = block * ROWS * C; i < least_of(total, (block + 1) * ROWS * C); i += C) {
                const float *p_row = p + s * total + i, *g_row = grads[s] + i;
                sum += constraint ? square_norm(p_row, g_row, C, constraint) : square_norm(p_row, g_row, least_of(C, total - i), FREE);
            }
            partial[s * blocks + block] = sum;
        }
    for (int64_t s = 0; s < S; s++) {
        double sum = 0;
        for (int64_t block = 0; block < blocks; block++)
            sum += partial[s * blocks + block];
        squares[s] = (float)sum;
    }
}

INLINE uint16_t bfloat16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16; /* to nearest, ties to even */
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

/* Of one SAE's step: lr / (1 - beta1^t), the clipping, both moments' shares of old and new, sqrt(1 - beta2^t). */
typedef struct {
    float rate, scale, old1, new1, old2, new2, root, eps;
} Adam;

INLINE void update_row(float *restrict p, const float *restrict g, float *restrict m, float *restrict v, uint16_t *restrict shadow,
                       int64_t C, Adam a, int constraint)
{
    float away = constraint ? radial(p, g, C, constraint) : 0, square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t c = 0; c < C; c++) {
        float grad = (constraint ? g[c] - away * p[c] : g[c]) * a.scale, first = grad;
        if (m)
            m[c] = first = a.old1 * m[c] + a.new1 * grad;
        v[c] = a.old2 * v[c] + a.new2 * grad * grad;
        p[c] -= a.rate * first / (sqrtf(v[c]) / a.root + a.eps);
        square += p[c] * p[c];
    }
    if (constraint) {
        float inverse = 1 / (sqrtf(square) + (constraint == PROJECT ? FLT_EPSILON : 0));
        for (int64_t c = 0; c < C; c++)
            p[c] *= inverse;
    }
    if (shadow)
        for (int64_t c = 0; c < C; c++)
            shadow[c] = bfloat16(p[c]);
}

void update(float *p, const float *const *grads, float *m, float *v, uint16_t *shadow, int64_t S, int64_t total, int64_t C,
            const double *lr, const double *scale, const double *steps, double beta1, double beta2, double eps, int64_t constraint,
            int64_t threads)
{
    for (int64_t s = 0; s < S; s++) {
        if (!isfinite(scale[s]))
            continue;
        Adam a = {.rate = (float)(lr[s] / (1 - pow(beta1, steps[s]))), .scale = (float)scale[s], .eps = (float)eps,
                  .old1 = (float)beta1, .new1 = (float)(1 - beta1), .old2 = (float)beta2, .new2 = (float)(1 - beta2),
                  .root = (float)sqrt(1 - pow(beta2, steps[s]))};
#pragma omp parallel for schedule(dynamic, ROWS) num_threads(threads)
        for (int64_t from = 0; from < total; from += C) {
            int64_t i = s * total + from, n = least_of(C, total - from);
            const float *g = grads[s] + from;
            uint16_t *copy = shadow ? shadow + i : NULL;
            if (constraint && m)
                update_row(p + i, g, m + i, v + i, copy, n, a, constraint);
            else if (constraint)
                update_row(p + i, g, NULL, v + i, copy, n, a, constraint);
            else if (m)
                update_row(p + i, g, m + i, v + i, copy, n, a, FREE);
            else
                update_row(p + i, g, NULL, v + i, copy, n, a, FREE);
        }
    }
}

/* --- the dense layout -------------------------------------------------------------------------------------------------------------- */

#define COLUMNS 256 /* of a block: its part of a row is a few cache lines, and its sums stay in the nearest cache */

INLINE void split_block(const void *pre, int bf16, const float *limit, float *values, uint8_t *mask, float *sums, float *counts, int64_t B,
                        int64_t F, int64_t from, int64_t n)
{
    float sum[COLUMNS] = {0}, count[COLUMNS] = {0};
    for (int64_t b = 0; b < B; b++) {
        const void *x = row_of(pre, bf16, F, b);
        float *v = values + b * F + from;
        uint8_t *m = mask + b * F + from;
        for (int64_t i = 0; i < n; i++) {
            float value = at(x, bf16, from + i);
            int over = value > limit[i];
            m[i] = (uint8_t)over;
            v[i] = value = over ? value : 0;
            sum[i] += value;
            count[i] += (float)over;
        }
    }
    memcpy(sums + from, sum, (size_t)n * sizeof(float));
    memcpy(counts + from, count, (size_t)n * sizeof(float));
}

void split(const void *pre, int64_t bf16, const float *threshold, int64_t each, float *values, uint8_t *mask, float *sums, float *counts,
           int64_t B, int64_t F, int64_t threads)
{
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t from = 0; from < F; from += COLUMNS) {
        int64_t n = least_of(COLUMNS, F - from);
        float limit[COLUMNS];
        for (int64_t i = 0; i < n; i++)
            limit[i] = threshold[(from + i) * each];
        if (bf16)
            split_block(pre, 1, limit, values, mask, sums, counts, B, F, from, n);
        else
            split_block(pre, 0, limit, values, mask, sums, counts, B, F, from, n);
    }
}

void count_positive(const float *x, float *counts, int64_t B, int64_t F, int64_t threads)
{
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t from = 0; from < F; from += COLUMNS) {
        int64_t n = least_of(COLUMNS, F - from);
        float count[COLUMNS] = {0};
        for (int64_t b = 0; b < B; b++)
            for (int64_t i = 0; i < n; i++)
                count[i] += (float)(x[b * F + from + i] > 0);
        memcpy(counts + from, count, (size_t)n * sizeof(float));
    }
}

void select_(const uint8_t *mask, const float *x, const float *add, float *out, float *sums, int64_t B, int64_t F, int64_t threads)
{
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t from = 0; from < F; from += COLUMNS) {
        int64_t n = least_of(COLUMNS, F - from);
        float sum[COLUMNS] = {0}, more[COLUMNS] = {0};
        if (add)
            memcpy(more, add + from, (size_t)n * sizeof(float));
        for (int64_t b = 0; b < B; b++) {
            const uint8_t *m = mask + b * F + from;
            const float *g = x + b * F + from;
            float *o = out + b * F + from;
            for (int64_t i = 0; i < n; i++) {
                float value = m[i] ? g[i] + more[i] : 0;
                o[i] = value;
                sum[i] += value;
            }
        }
        memcpy(sums + from, sum, (size_t)n * sizeof(float));
    }
}
