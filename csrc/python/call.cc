#include "python/call.h"

#include <mutex>

#include "core/error.h"
#include "cpu/select.h"
#include "python/cuda_backend.h"

namespace py = pybind11;

namespace gpt2f {

struct OpBackend {
  const KernelTable* table;
  ThreadPool pool;
  std::mutex mutex;

  OpBackend(const KernelTable* table_, int threads) : table(table_), pool(threads) {}
};

namespace {

std::shared_ptr<OpBackend>& backend() {
  static auto* const kBackend = new std::shared_ptr<OpBackend>();  // outlives every thread
  if (*kBackend == nullptr) {
    *kBackend = std::make_shared<OpBackend>(find_table(default_isa()), default_threads());
  }
  return *kBackend;
}

}  // namespace

void set_op_backend(const std::string& isa, int threads) {
  backend() = std::make_shared<OpBackend>(find_table(isa), threads);
}

Call::Call(const char* op, const py::object& cuda) : op_(op) {
  if (cuda.is_none()) {
    backend_ = backend();
    return;
  }
  cuda_table();
  where_ = Where::kCuda;
  const auto [stream, allocate] = cuda.cast<std::pair<uintptr_t, py::object>>();
  stream_ = reinterpret_cast<void*>(stream);
  allocate_ = allocate;
}

const KernelTable& Call::table() const { return cuda() ? *cuda_table() : *backend_->table; }

int64_t Call::lanes() const { return cuda() ? 1 : backend_->pool.size(); }

void* Call::take_bytes(int64_t bytes) {
  if (!cuda()) {
    buffers_.emplace_back(static_cast<size_t>(bytes), "scratch");
    return buffers_.back().as<void>();
  }
  tensors_.push_back(allocate_(bytes));
  return Arg(op_, "scratch", tensors_.back(), Where::kCuda).data();
}

void Call::check_product(const Arg& x) const {
  if (!cuda() || x.dtype() != DType::kBF16) return;
  const int capability = cuda_table()->device->capability(x.device());
  check(capability >= 80, ErrorKind::kDevice, op_, ": device 'cuda:", x.device(),
        "': compute capability ", capability / 10, ".", capability % 10,
        " has no bfloat16 products; use float16");
}

int Call::device_of(std::initializer_list<const Arg*> arguments) {
  const int device = (*arguments.begin())->device();
  for (const Arg* each : arguments) {
    if (each != nullptr && each->device() != device) {
      each->fail("must be on cuda:", device, ", got cuda:", each->device());
    }
  }
  return device;
}

void Call::run_raw(int device, Work work, const void* data) {
  if (!cuda()) {
    without_gil([&] {
      const std::lock_guard lock(backend_->mutex);
      backend_->pool.run([&](const Lane& lane) { work(data, *backend_->table, lane); });
    });
    return;
  }
  without_gil([&] {
    const CudaVisit visit(device);
    Lane lane;
    lane.stream = stream_;
    work(data, *cuda_table(), lane);
  });
}

}  // namespace gpt2f
