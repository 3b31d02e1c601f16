// Packed matrices and the matmul kernels, as the tests and benchmarks call them.
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <new>

#include "bindings.h"
#include "gmtp/error.h"
#include "gmtp/kernels.h"
#include "gmtp/threads.h"

namespace gmtp {
namespace {

using FileBytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using FloatArray = nb::ndarray<nb::numpy, float>;

constexpr const char* kTypeNames[] = {"F32",  "F16",  "BF16", "Q4_0", "Q4_1", "Q5_0",   "Q5_1",  "Q8_0",
                                      "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"};

// Uninitialised memory aligned to 64 bytes.
template <class T> class AlignedArray {
public:
    explicit AlignedArray(size_t count)
        : data_(static_cast<T*>(::operator new(std::max<size_t>(count, 1) * sizeof(T), std::align_val_t(64)))) {}
    T* get() const { return data_.get(); }

private:
    struct Free { void operator()(T* p) const { ::operator delete(p, std::align_val_t(64)); } };
    std::unique_ptr<T, Free> data_;
};

struct PackedMatrix {
    AlignedArray<uint8_t> bytes;
    Matrix view;
};

FloatArray new_array(size_t rows, size_t cols) {
    float* data = new float[rows * cols];
    nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<float*>(p); });
    return FloatArray(data, {rows, cols}, owner);
}

PackedMatrix pack(const std::string& type, FileBytes data, int64_t rows, int64_t cols) {
    const WeightType t = weight_type(type);
    if (rows <= 0) throw InputError("A weight matrix needs at least one row.");
    if (data.size() != rows * file_row_bytes(t, cols)) throw InputError("The bytes of a weight matrix do not fit its shape.");
    Matrix m{t, rows, cols, nullptr};
    PackedMatrix packed{AlignedArray<uint8_t>(m.groups() * group_bytes(t, cols)), m};
    packed.view.data = packed.bytes.get();
    nb::gil_scoped_release release;
    pack_groups(t, data.data(), rows, cols, 0, m.groups(), packed.bytes.get());
    return packed;
}

// The activations of a call: rows padded to a multiple of 32 columns, quantised if the weights are.
struct Inputs {
    Inputs(const float* x, int64_t rows, int64_t cols, const MatmulKernels& kernels, int digits = 1)
        : stride((cols + kBlock - 1) / kBlock * kBlock), digits(digits), x(rows * stride), q(rows * digits * stride / kBlock) {
        if (digits != 1 && digits != 2) throw InputError("Activations have one digit or two.");
        for (int64_t r = 0; r < rows; r++) {
            memset(this->x.get() + r * stride, 0, stride * sizeof(float));
            memcpy(this->x.get() + r * stride, x + r * cols, cols * sizeof(float));
            kernels.quantize(view(), r, 0, stride);
        }
    }
    Activations view() const { return {x.get(), q.get(), stride, digits}; }

    int64_t stride;
    int digits;
    AlignedArray<float> x;
    AlignedArray<QuantBlock> q;
};

FloatArray matmul(const PackedMatrix& w, Rows x, const std::string& isa, int64_t group0, int64_t group1, int row0, int row1,
                  int digits) {
    const Matrix& m = w.view;
    const MatmulKernels& kernels = *kernels_for(isa).matmul;
    if (group1 < 0) group1 = m.groups();
    if ((int64_t)x.shape(1) != m.cols) throw InputError("The activations' columns do not fit the weight matrix.");
    if (group0 < 0 || group0 > group1 || group1 > m.groups()) throw InputError("The groups are not within the weight matrix.");
    const int64_t rows = x.shape(0), width = m.groups() * kGroupRows;
    if (row1 < 0) row1 = (int)rows;
    if (row0 < 0 || row0 > row1 || row1 > rows) throw InputError("The rows are not within the activations.");
    FloatArray result = new_array(rows, width);
    std::fill_n(result.data(), rows * width, 0.0f);
    Inputs inputs(x.data(), rows, m.cols, kernels, digits);
    kernels.matmul(m, group0, group1, inputs.view(), row0, row1, result.data(), width);
    return result;
}

// Seconds of each of `repeats` products of random rows with the matrix, the groups shared over `threads`.
std::vector<double> time_matmul(const PackedMatrix& w, int rows, int threads, const std::string& isa, int repeats) {
    const Matrix& m = w.view;
    const MatmulKernels& kernels = *kernels_for(isa).matmul;
    if (rows < 1 || threads < 1) throw InputError("A timed product needs at least one row and one thread.");
    AlignedArray<float> values(rows * m.cols), out(rows * m.groups() * kGroupRows);
    uint32_t state = 1;
    for (int64_t i = 0; i < rows * m.cols; i++) {
        state = state * 1664525u + 1013904223u;
        values.get()[i] = (float)(int32_t)state * 0x1p-31f;
    }
    Inputs inputs(values.get(), rows, m.cols, kernels);
    nb::gil_scoped_release release;
    ThreadPool pool(threads);
    const int64_t chunk = std::clamp<int64_t>(m.groups() / (16 * threads), 1, 16);
    std::vector<double> seconds;
    for (int i = 0; i < repeats; i++) {
        const auto start = std::chrono::steady_clock::now();
        pool.parallel_for(m.groups(), chunk, [&](int64_t g0, int64_t g1) {
            kernels.matmul(m, g0, g1, inputs.view(), 0, rows, out.get(), m.groups() * kGroupRows);
        });
        seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    return seconds;
}

// Seconds of each of `repeats` reads of all arrays, one after the other; of each the whole lines of 64 bytes.
std::vector<double> time_read(const std::vector<FileBytes>& arrays, int threads, int repeats) {
    constexpr int64_t kLines = 512;  // at a time
    if (threads < 1) throw InputError("A timed read needs at least one thread.");
    nb::gil_scoped_release release;
    ThreadPool pool(threads);
    Loops loops(threads, arrays.size());
    std::vector<double> seconds;
    std::atomic<uint64_t> total{0};
    for (int i = 0; i < repeats; i++) {
        const auto start = std::chrono::steady_clock::now();
        loops.reset();
        pool.run([&](int thread) {
            for (size_t a = 0; a < arrays.size(); a++) {
                const auto* all = reinterpret_cast<const uint64_t*>(arrays[a].data());
                loops[a].run_chunks(thread, static_cast<int64_t>(arrays[a].size() / 64), kLines, [&](int64_t begin, int64_t end) {
                    uint64_t sums[8] = {};
                    for (const uint64_t *p = all + begin * 8, *past = all + end * 8; p < past; p += 8) {
                        __builtin_prefetch(p + 1024, 0, 2);  // 8 KiB ahead, as the kernels do
                        for (int k = 0; k < 8; k++) sums[k] += p[k];
                    }
                    for (uint64_t s : sums) total.fetch_add(s, std::memory_order_relaxed);
                });
            }
        });
        seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    return seconds;
}

FloatArray unpack_rows(const PackedMatrix& w, int64_t row, int64_t count) {
    if (row < 0 || count < 0 || row + count > w.view.rows) throw InputError("The rows are not within the weight matrix.");
    FloatArray result = new_array(count, w.view.cols);
    for (int64_t r = 0; r < count; r++) unpack_row(w.view, row + r, result.data() + r * w.view.cols);
    return result;
}

FloatArray dequantize_bytes(const std::string& type, FileBytes data, int64_t count) {
    const WeightType t = weight_type(type);
    if (count < 0 || data.size() != (count ? file_row_bytes(t, count) : 0))
        throw InputError("The bytes of a tensor do not fit its count of values.");
    FloatArray result = new_array(1, count);
    dequantize(t, data.data(), count, result.data());
    return result;
}

// The rows of a matrix as a GGUF tensor's bytes.
nb::ndarray<nb::numpy, uint8_t> quantize_weights(const std::string& type, Rows x, ThreadPool* pool) {
    const WeightType t = weight_type(type);
    const auto rows = (int64_t)x.shape(0), cols = (int64_t)x.shape(1);
    const size_t row_bytes = file_row_bytes(t, cols);
    auto bytes = std::make_unique<uint8_t[]>(rows * row_bytes);
    const auto convert = [&](int64_t begin, int64_t end) {
        quantize(t, x.data() + begin * cols, (end - begin) * cols, bytes.get() + begin * row_bytes);
    };
    {
        nb::gil_scoped_release release;
        if (pool) pool->parallel_for(rows, 16, convert);
        else convert(0, rows);
    }
    nb::capsule owner(bytes.get(), [](void* p) noexcept { delete[] static_cast<uint8_t*>(p); });
    return nb::ndarray<nb::numpy, uint8_t>(bytes.release(), {rows * row_bytes}, owner);
}

nb::tuple quantize_rows(Rows x, const std::string& isa) {
    const MatmulKernels& kernels = *kernels_for(isa).matmul;
    const size_t rows = x.shape(0), cols = x.shape(1), blocks = cols / kBlock;
    if (cols % kBlock) throw InputError("Rows to quantise must be a multiple of 32 long.");
    Inputs inputs(x.data(), rows, cols, kernels);
    FloatArray q = new_array(rows, cols), scale = new_array(rows, blocks), sum = new_array(rows, blocks);
    for (size_t b = 0; b < rows * blocks; b++) {
        const QuantBlock& block = inputs.q.get()[b];
        for (int c = 0; c < kBlock; c++) q.data()[b * kBlock + c] = block.q[c];
        scale.data()[b] = block.scale, sum.data()[b] = block.sum;
    }
    return nb::make_tuple(q, scale, sum);
}

}  // namespace

WeightType weight_type(const std::string& name) {
    for (size_t i = 0; i < std::size(kTypeNames); i++)
        if (name == kTypeNames[i]) return static_cast<WeightType>(i);
    throw InputError("There is no weight type '" + name + "'.");
}

const char* weight_type_name(WeightType type) { return kTypeNames[static_cast<size_t>(type)]; }

void bind_matrix(nb::module_& m) {
    using namespace nb::literals;
    nb::class_<PackedMatrix>(m, "PackedMatrix", "A weight matrix in the kernels' layout.")
        .def_prop_ro("type", [](const PackedMatrix& w) { return kTypeNames[(size_t)w.view.type]; })
        .def_prop_ro("rows", [](const PackedMatrix& w) { return w.view.rows; })
        .def_prop_ro("cols", [](const PackedMatrix& w) { return w.view.cols; })
        .def_prop_ro("nbytes", [](const PackedMatrix& w) { return w.view.groups() * group_bytes(w.view.type, w.view.cols); })
        .def_prop_ro("data", [](const PackedMatrix& w) {
            const size_t size = w.view.groups() * group_bytes(w.view.type, w.view.cols);
            return nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>>(w.view.data, {size}, nb::handle());
        }, nb::rv_policy::reference_internal, "uint8 [nbytes]: as it is packed.")
        .def("unpack_rows", &unpack_rows, "row"_a, "count"_a, "float32 [count, cols]: the exact values of the file.");
    m.attr("WEIGHT_TYPES") = std::vector<std::string>(std::begin(kTypeNames), std::end(kTypeNames));
    m.def("file_row_bytes", [](const std::string& type, int64_t cols) { return file_row_bytes(weight_type(type), cols); },
          "type"_a, "cols"_a, "Bytes of a row of `cols` values in a GGUF file.");
    m.def("pack", &pack, "type"_a, "data"_a, "rows"_a, "cols"_a, "Packs a GGUF tensor's bytes (uint8).");
    m.def("dequantize", &dequantize_bytes, "type"_a, "data"_a, "count"_a,
          "float32 [1, count]: the values of a GGUF tensor's bytes (uint8).");
    m.def("quantize_weights", &quantize_weights, "type"_a, "x"_a, "pool"_a = nb::none(),
          "The bytes (uint8) of a GGUF tensor of that type with the values x [rows, cols]. Raises InputError on values that are\n"
          "not finite or that the type cannot hold.");
    m.def("matmul", &matmul, "weights"_a, "x"_a, "isa"_a = "auto", "group0"_a = 0, "group1"_a = -1, "row0"_a = 0, "row1"_a = -1,
          "digits"_a = 1, "x [T, cols] times the transposed matrix: float32 [T, rows padded to 16], zero outside groups group0..group1-1 and rows row0..row1-1.");
    m.def("quantize", &quantize_rows, "x"_a, "isa"_a = "auto",
          "int8 activations as the kernels see them: q [T, cols], scale [T, cols/32], sum of q [T, cols/32], all as float32.");
    m.def("time_matmul", &time_matmul, "weights"_a, "rows"_a, "threads"_a, "isa"_a = "auto", "repeats"_a = 10,
          "Seconds of each of `repeats` products with `rows` random rows.");
    m.def("time_read", &time_read, "arrays"_a, "threads"_a, "repeats"_a = 10,
          "Seconds of each of `repeats` reads of all the arrays (uint8), one after the other.");
}

}  // namespace gmtp
