#include <memory>
#include <vector>

#include "bind/borrow.h"
#include "ops/all.h"
#include "runtime/runtime.h"

namespace pykern {

static constexpr const char* kStep = "lm_step";

// Reads what a Python dict says about a model or a layer.
class Fields {
 public:
  explicit Fields(const py::dict& dict) : dict_(dict) {}

  py::object get(const char* name) const {
    return dict_.contains(name) ? py::object(dict_[name]) : py::object(py::none());
  }
  template <class T>
  T value(const char* name) const {
    PYKERN_CHECK(value, dict_.contains(name), kStep, ": ", name, " is missing");
    try {
      return dict_[name].cast<T>();
    } catch (const py::cast_error&) {
      fail(Kind::type, kStep, ": ", name, " is of the wrong type");
    }
  }
  Tensor tensor(const char* name) const { return Optional(get(name), kStep, name).tensor(); }
  // (panels, scales or None, N, K, kind, group)
  PackedWeight weight(const char* name) const {
    const py::object given = get(name);
    if (given.is_none()) return {};
    const auto tuple = given.cast<py::tuple>();
    PYKERN_CHECK(value, tuple.size() == 6, kStep, ": ", name, " is not a packed weight");
    PackedWeight w;
    w.panels = Borrowed(tuple[0], kStep, name).tensor();
    w.scales = Optional(tuple[1], kStep, name).tensor();
    w.N = tuple[2].cast<int64_t>(), w.K = tuple[3].cast<int64_t>();
    const auto kind = tuple[4].cast<std::string>();
    PYKERN_CHECK(value, kind == "numbers" || kind == "int8" || kind == "int4", kStep, ": ", name,
                 " is of kind ", kind, ", expected numbers, int8 or int4");
    w.kind = kind == "int8"   ? WeightKind::int8
             : kind == "int4" ? WeightKind::int4
                              : WeightKind::numbers;
    w.group = tuple[5].cast<int64_t>();
    check_layout(name, w);
    return w;
  }

 private:
  // Panels are read as the ISA in use lays them out, on CUDA rows are.
  static void check_layout(const char* name, const PackedWeight& w) {
    const Tensor& t = w.panels;
    if (t.device == Device::cuda || runtime::panel_width() == 0) {
      PYKERN_CHECK(value, t.rank == 2 && w.kind == WeightKind::numbers, kStep, ": ", name,
                   " is packed, which CUDA does not read");
      return;
    }
    const bool pairs = t.dtype == DType::bf16 && runtime::pairs_bf16();
    const int width = runtime::panel_width() / (w.kind == WeightKind::int4 ? 2 : 1);
    PYKERN_CHECK(value,
                 t.rank == (pairs ? 4 : 3) && t.size[2] == width && (!pairs || t.size[3] == 2),
                 kStep, ": ", name, " is not packed for the ISA in use, ", runtime::isa());
  }

  const py::dict& dict_;
};

// A model whose tensors are borrowed for as long as it lives.
class Model {
 public:
  Model(py::dict model, py::list layers) {
    owned_.append(model.attr("copy")());  // the caller may change its dicts
    for (py::handle layer : layers) {
      PYKERN_CHECK(type, py::isinstance<py::dict>(layer), kStep, ": a layer is not a dict");
      owned_.append(layer.attr("copy")());
      layers_.push_back(layer_of(layer.cast<py::dict>()));
    }
    const Fields f(model);
    model_.n_head = f.value<int64_t>("n_head"), model_.n_kv_head = f.value<int64_t>("n_kv_head");
    model_.head_size = f.value<int64_t>("head_size"), model_.hidden = f.value<int64_t>("hidden");
    model_.vocabulary = f.value<int64_t>("vocabulary");
    model_.max_len = f.value<int64_t>("max_len");
    model_.layer_norm = f.value<bool>("layer_norm"), model_.qk_norm = f.value<bool>("qk_norm");
    model_.norm_eps = f.value<double>("norm_eps");
    model_.qk_norm_eps = f.value<double>("qk_norm_eps");
    model_.scale = f.value<double>("scale");
    model_.embedding_scale = f.value<double>("embedding_scale");
    model_.activation = activation_named(kStep, f.value<std::string>("activation").c_str());
    model_.embedding = f.tensor("embedding"), model_.positions = f.tensor("positions");
    model_.rotary_cos = f.tensor("rotary_cos"), model_.rotary_sin = f.tensor("rotary_sin");
    model_.alibi_slopes = f.tensor("alibi_slopes");
    model_.distance_bias = f.tensor("distance_bias");
    model_.ln_f_weight = f.tensor("ln_f_weight"), model_.ln_f_bias = f.tensor("ln_f_bias");
    model_.head = f.weight("head");
    model_.layers = layers_.data(), model_.n_layer = static_cast<int64_t>(layers_.size());
    check(model_);
  }
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  void step(py::handle tokens, py::handle first_rows, py::handle lengths, py::handle block_table,
            py::handle logits) const {
    const Borrowed tokens_(tokens, kStep, "tokens"), first_rows_(first_rows, kStep, "first_rows");
    const Borrowed lengths_(lengths, kStep, "lengths"), table_(block_table, kStep, "block_table");
    const Optional logits_(logits, kStep, "logits");
    const LmStep op{&model_, tokens_, first_rows_, lengths_, table_, logits_};
    PYKERN_RUN(lm_step, op, here());
  }

  int64_t generate(py::handle tokens, py::handle first_rows, py::handle lengths,
                   py::handle block_table, py::handle ids, py::handle seeds, py::handle draws,
                   py::handle history, py::handle counts, py::handle stop_tokens,
                   double temperature, int64_t top_k, double top_p, double min_p,
                   double repetition_penalty) const {
    const Borrowed tokens_(tokens, kStep, "tokens"), first_rows_(first_rows, kStep, "first_rows");
    const Borrowed lengths_(lengths, kStep, "lengths"), table_(block_table, kStep, "block_table");
    const Borrowed ids_(ids, kStep, "ids"), seeds_(seeds, kStep, "seeds");
    const Borrowed draws_(draws, kStep, "draws");
    const Optional history_(history, kStep, "history"), counts_(counts, kStep, "counts");
    const Optional stop_(stop_tokens, kStep, "stop_tokens");
    int64_t steps = 0;
    const LmGenerate op{{&model_, tokens_, first_rows_, lengths_, table_, {}},
                        ids_,
                        seeds_,
                        draws_,
                        history_,
                        counts_,
                        stop_,
                        {temperature, top_p, min_p, repetition_penalty, top_k},
                        &steps};
    PYKERN_RUN(lm_generate, op, here());
    return steps;
  }

 private:
  // The device of the model, and the stream in which its framework works at the moment
  Tensor here() const {
    return Borrowed(owned_[0].cast<py::dict>()["embedding"], kStep, "embedding").tensor();
  }
  static LmLayer layer_of(const py::dict& dict) {
    const Fields f(dict);
    LmLayer layer;
    layer.ln_1_weight = f.tensor("ln_1_weight"), layer.ln_1_bias = f.tensor("ln_1_bias");
    layer.ln_2_weight = f.tensor("ln_2_weight"), layer.ln_2_bias = f.tensor("ln_2_bias");
    layer.attn = f.weight("attn"), layer.proj = f.weight("proj"), layer.up = f.weight("up");
    layer.gate = f.weight("gate"), layer.down = f.weight("down");
    layer.attn_bias = f.tensor("attn_bias"), layer.proj_bias = f.tensor("proj_bias");
    layer.up_bias = f.tensor("up_bias"), layer.gate_bias = f.tensor("gate_bias");
    layer.down_bias = f.tensor("down_bias");
    layer.k_cache = f.tensor("k_cache"), layer.v_cache = f.tensor("v_cache");
    layer.k_scale = f.tensor("k_scale"), layer.v_scale = f.tensor("v_scale");
    return layer;
  }

  py::list owned_;
  std::vector<LmLayer> layers_;
  LmModel model_;
};

void bind_lm_step(py::module_& m) {
  using py::arg;
  py::class_<Model>(m, "LmModel")
      .def(py::init<py::dict, py::list>(), arg("model"), arg("layers"))
      .def("step", &Model::step, arg("tokens"), arg("first_rows"), arg("lengths"),
           arg("block_table"), arg("logits"))
      .def("generate", &Model::generate, arg("tokens"), arg("first_rows"), arg("lengths"),
           arg("block_table"), arg("ids"), py::kw_only(), arg("seeds"), arg("draws"),
           arg("history") = py::none(), arg("counts") = py::none(), arg("stop_tokens") = py::none(),
           arg("temperature") = 1.0, arg("top_k") = 0, arg("top_p") = 1.0, arg("min_p") = 0.0,
           arg("repetition_penalty") = 1.0);
}

}  // namespace pykern
