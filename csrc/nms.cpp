// Non-maximum suppression, host side: schema, argument checks, allocation, sorting for the GPU, device switch.
#include "nms.h"

#include <ATen/ops/gather.h>
#include <ATen/ops/sort.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "norm_host.h"

namespace fastnorm {
namespace {

// boxes [rows, n, 4], scores and segments [rows, n]; without rows where the operator takes one image.
void check_boxes(const Tensor& boxes, const Tensor& scores, const OptionalTensor& segments, bool rows, const char* op) {
  const int64_t dim = rows ? 3 : 2;
  TORCH_CHECK(boxes.dim() == dim, op, ": boxes should be a ", dim, "d tensor, got ", boxes.dim(), "D");
  TORCH_CHECK(boxes.sym_size(-1) == 4, op, ": boxes should have 4 elements in dimension ", dim - 1, ", got ",
              boxes.sym_size(-1));
  TORCH_CHECK(scores.dim() == dim - 1, op, ": scores should be a ", dim - 1, "d tensor, got ", scores.dim(), "D");
  for (int64_t d = 0; d < dim - 1; d++)
    TORCH_CHECK(boxes.sym_size(d) == scores.sym_size(d), op,
                ": boxes and scores should have same number of elements in dimension ", d, ", got ", boxes.sym_size(d),
                " and ", scores.sym_size(d));
  dtype_of(boxes, op, "boxes");
  TORCH_CHECK(boxes.scalar_type() == scores.scalar_type(), op, ": boxes should have the same type as scores, got ",
              dtype_text(boxes.scalar_type()), " and ", dtype_text(scores.scalar_type()));
  check_same_device(scores, boxes, op, "scores");
  if (!segments) return;
  TORCH_CHECK(segments->sym_sizes() == scores.sym_sizes(), op, ": idxs must have the scores' shape ",
              shape_text(scores), ", got ", shape_text(*segments));
  TORCH_CHECK(segments->scalar_type() == at::kLong, op, ": idxs must be int64 here, got ",
              dtype_text(segments->scalar_type()));
  check_same_device(*segments, boxes, op, "idxs");
}

const int64_t* longs(const OptionalTensor& t) { return t ? t->const_data_ptr<int64_t>() : nullptr; }

// What both structs have; the tensors are contiguous.
template <class Args>
void set_inputs(Args& a, const Tensor& boxes, const Tensor& scores, const OptionalTensor& segments, const char* op) {
  a.n = boxes.size(-2);
  TORCH_CHECK(a.n <= std::numeric_limits<int32_t>::max(), op, ": there must be fewer than 2^31 boxes, got ", a.n);
  a.dtype = dtype_of(boxes, op, "boxes");
  a.boxes = boxes.const_data_ptr(), a.scores = scores.const_data_ptr(), a.segments = longs(segments);
}

// A score threshold as comparing a tensor of this type with it rounds it.
double rounded(double v, at::ScalarType t) {
  switch (t) {
    case at::kFloat: return float(v);
    case at::kHalf: return c10::Half(float(v));
    case at::kBFloat16: return c10::BFloat16(float(v));
    default: return v;
  }
}

std::tuple<Tensor, Tensor> nms_rows(const Tensor& boxes_in, const Tensor& scores_in, const OptionalTensor& segments_in,
                                    double iou_threshold, std::optional<double> score_threshold, c10::SymInt capacity,
                                    const char* op) {
  TORCH_CHECK(capacity >= 0, op, ": max_output must not be negative, got ", capacity);
  const auto options = boxes_in.options().dtype(at::kLong).memory_format(at::MemoryFormat::Contiguous);
  Tensor indices = empty_tensor({boxes_in.sym_size(0), capacity}, options);
  Tensor count = empty_tensor(boxes_in.sym_size(0), options);
  const Device device = device_of(boxes_in, op);
  if (device == Device::kMeta) return {indices, count};
  if (boxes_in.numel() == 0) return {indices.fill_(-1), count.zero_()};

  const Tensor boxes = boxes_in.contiguous(), scores = scores_in.contiguous();
  const OptionalTensor segments = contiguous(segments_in);
  Nms a{};
  set_inputs(a, boxes, scores, segments, op);
  a.rows = boxes.size(0), a.capacity = capacity.expect_int(), a.threshold = iou_threshold;
  a.drop = score_threshold.has_value(), a.drop_scores = rounded(score_threshold.value_or(0), scores.scalar_type());
  a.indices = indices.mutable_data_ptr<int64_t>(), a.count = count.mutable_data_ptr<int64_t>();
  Tensor order, grouped;
  OptionalTensor grouped_segments;
  if (device == Device::kCuda) {
    order = grouped = std::get<1>(at::sort(scores, true, 1, true)).contiguous();
    if (segments) {
      const auto [sorted, places] = at::sort(at::gather(*segments, 1, order), true, 1, false);
      grouped_segments = sorted.contiguous(), grouped = at::gather(order, 1, places).contiguous();
    }
    a.order = longs(order), a.grouped = longs(grouped), a.grouped_segments = longs(grouped_segments);
  }
  FASTNORM_RUN(nms, a, boxes, device, op);
  return {indices, count};
}

std::tuple<Tensor, Tensor> nms_padded(const Tensor& boxes, const Tensor& scores, const OptionalTensor& segments,
                                      double iou_threshold, std::optional<double> score_threshold,
                                      c10::SymInt max_output) {
  check_boxes(boxes, scores, segments, true, "nms_padded");
  return nms_rows(boxes, scores, segments, iou_threshold, score_threshold, max_output, "nms_padded");
}

OptionalTensor one_row(const OptionalTensor& t) { return t ? OptionalTensor(t->unsqueeze(0)) : t; }

Tensor nms(const Tensor& boxes, const Tensor& scores, const OptionalTensor& segments, double iou_threshold,
           std::optional<double> score_threshold, std::optional<int64_t> max_output) {
  check_boxes(boxes, scores, segments, false, "nms");
  const int64_t n = boxes.size(0), capacity = std::min(max_output.value_or(n), n);
  if (capacity == 0) return empty_tensor(0, boxes.options().dtype(at::kLong));
  const auto [indices, count] = nms_rows(boxes.unsqueeze(0), scores.unsqueeze(0), one_row(segments), iou_threshold,
                                         score_threshold, capacity, "nms");
  return indices[0].narrow(0, 0, count.item<int64_t>());
}

std::tuple<Tensor, Tensor> soft_nms(const Tensor& boxes_in, const Tensor& scores_in, const OptionalTensor& segments_in,
                                    bool gaussian, double iou_threshold, double sigma, double score_threshold,
                                    std::optional<int64_t> max_output) {
  constexpr const char* op = "soft_nms";
  check_boxes(boxes_in, scores_in, segments_in, false, op);
  TORCH_CHECK_VALUE(sigma > 0, op, ": sigma must be positive, got ", sigma);
  const Tensor boxes = boxes_in.contiguous(), scores = scores_in.contiguous();
  const OptionalTensor segments = contiguous(segments_in);
  SoftNms a{};
  set_inputs(a, boxes, scores, segments, op);
  a.capacity = std::min(max_output.value_or(a.n), a.n);
  TORCH_CHECK(a.capacity >= 0, op, ": max_output must not be negative, got ", a.capacity);
  const auto options = boxes.options().dtype(at::kLong);
  const Tensor indices = empty_tensor(a.capacity, options), updated = empty_tensor(a.capacity, boxes.options());
  if (a.capacity == 0) return {indices, updated};
  const Tensor count = empty_tensor(1, options);
  a.gaussian = gaussian, a.threshold = iou_threshold, a.sigma = sigma, a.drop_scores = score_threshold;
  a.indices = indices.mutable_data_ptr<int64_t>(), a.updated = updated.mutable_data_ptr();
  a.count = count.mutable_data_ptr<int64_t>();
  const Device device = device_of(boxes, op);
  FASTNORM_RUN(soft_nms, a, boxes, device, op);
  const int64_t selected = count.item<int64_t>();
  return {indices.narrow(0, 0, selected), updated.narrow(0, 0, selected)};
}

}  // namespace
}  // namespace fastnorm

// The sizes of what nms and soft_nms return depend on the data: their fakes are in fastnorm/nms.py.
TORCH_LIBRARY_FRAGMENT(FASTNORM_LIBRARY, m) {
  m.def(
      "nms_padded(Tensor boxes, Tensor scores, Tensor? segments, float iou_threshold, float? score_threshold, "
      "SymInt max_output) -> (Tensor indices, Tensor count)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "nms(Tensor boxes, Tensor scores, Tensor? segments, float iou_threshold, float? score_threshold, "
      "int? max_output) -> Tensor",
      {at::Tag::pt2_compliant_tag, at::Tag::dynamic_output_shape});
  m.def(
      "soft_nms(Tensor boxes, Tensor scores, Tensor? segments, bool gaussian, float iou_threshold, float sigma, "
      "float score_threshold, int? max_output) -> (Tensor indices, Tensor updated)",
      {at::Tag::pt2_compliant_tag, at::Tag::dynamic_output_shape});
}

TORCH_LIBRARY_IMPL(FASTNORM_LIBRARY, CompositeExplicitAutograd, m) { m.impl("nms_padded", fastnorm::nms_padded); }
TORCH_LIBRARY_IMPL(FASTNORM_LIBRARY, CPU, m) {
  m.impl("nms", fastnorm::nms);
  m.impl("soft_nms", fastnorm::soft_nms);
}
TORCH_LIBRARY_IMPL(FASTNORM_LIBRARY, CUDA, m) {
  m.impl("nms", fastnorm::nms);
  m.impl("soft_nms", fastnorm::soft_nms);
}
