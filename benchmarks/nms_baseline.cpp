// The scalar loop that NMS is measured against: boxes are sorted by score, then every kept one is compared with all
// that come after it.  Built when the benchmark runs; not part of the library.
#include <torch/extension.h>

#include <algorithm>

static torch::Tensor nms(const torch::Tensor& boxes, const torch::Tensor& scores, double threshold) {
  const auto order = std::get<1>(scores.sort(true, 0, true));
  const auto columns = boxes.index_select(0, order).t().contiguous();
  const auto areas = (columns[2] - columns[0]) * (columns[3] - columns[1]);
  const int64_t n = boxes.size(0);
  const float *x1 = columns.const_data_ptr<float>(), *y1 = x1 + n, *x2 = y1 + n, *y2 = x2 + n;
  const float* const area = areas.const_data_ptr<float>();
  const auto suppressed = torch::zeros({n}, torch::kByte), kept = torch::empty({n}, torch::kLong);
  uint8_t* const gone = suppressed.mutable_data_ptr<uint8_t>();
  int64_t *const keep = kept.mutable_data_ptr<int64_t>(), count = 0;
  for (int64_t i = 0; i < n; i++) {
    if (gone[i]) continue;
    keep[count++] = i;
    for (int64_t j = i + 1; j < n; j++) {
      if (gone[j]) continue;
      const float width = std::max(0.f, std::min(x2[i], x2[j]) - std::max(x1[i], x1[j]));
      const float height = std::max(0.f, std::min(y2[i], y2[j]) - std::max(y1[i], y1[j]));
      const float both = width * height;
      if (both / (area[i] + area[j] - both) > threshold) gone[j] = 1;
    }
  }
  return order.index_select(0, kept.narrow(0, 0, count));
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("nms", nms, pybind11::call_guard<pybind11::gil_scoped_release>()); }
