#include "nsa/passes/halo.h"

#include <vector>

#include "nsa/passes/inputs.h"

namespace nsa {
namespace {

// Hands out aligned pieces of a workspace buffer one after another.
class Cursor {
 public:
  explicit Cursor(char* data) : data_(data) {}
  char* Take(int64_t num_bytes) {
    char* piece = data_ + used_;
    used_ += AlignUp(num_bytes);
    return piece;
  }

 private:
  char* data_;
  int64_t used_ = 0;
};

// The messages of one tensor: what follows the last one, there and for the same rank, joins it.
// Both ends have their rows by peer, so that one message goes each way between two ranks.
template <class Op>
class Messages {
 public:
  explicit Messages(std::vector<Op>& ops) : ops_(ops), first_(ops.size()) {}
  void Add(int32_t peer, char* data, int64_t num_bytes) {
    if (ops_.size() > first_ && ops_.back().peer == peer &&
        static_cast<const char*>(ops_.back().data) + ops_.back().num_bytes == data) {
      ops_.back().num_bytes += num_bytes;
    } else {
      ops_.push_back({peer, data, num_bytes});
    }
  }

 private:
  std::vector<Op>& ops_;
  const size_t first_;
};

}  // namespace

absl::StatusOr<std::array<BranchTokens, 3>> ExchangeHalo(PassContext& context,
                                                         const ForwardInputs& inputs,
                                                         void* stream) {
  const StageScope scope(context.stages, "halo", stream);
  const kernels::AttentionDims& dims = context.dims;
  const std::array<BranchInputs, 3> branches = BranchesOf(inputs);
  Cursor received(context.Buffer<char>(kHaloReceivedBuffer));
  Cursor to_send(context.Buffer<char>(kHaloToSendBuffer));
  std::vector<comm::SendOp> sends;
  std::vector<comm::RecvOp> recvs;

  // One tensor of one set of branches: pack what others need, name where theirs goes.
  auto exchange = [&](const ConstTensor& tensor, int set,
                      int32_t head_dim) -> absl::StatusOr<kernels::TokenRows> {
    const BranchKv& kv = context.rank_plan.kv[set];
    const int64_t row_elements = int64_t{dims.num_kv_heads} * head_dim;
    const int64_t row_bytes = row_elements * SizeOf(dims.dtype);
    char* halo = received.Take(kv.halo_rows * row_bytes);
    char* packed = to_send.Take(kv.send_rows * row_bytes);
    if (kv.send_rows > 0) {
      NSA_RETURN_IF_ERROR(context.kernels->CopyRows(
          {.dtype = dims.dtype,
           .num_heads = dims.num_kv_heads,
           .head_dim = head_dim,
           .src = View(tensor),
           .segments = context.Table<kernels::Segment>(context.tables.send_segments[set]),
           .num_segments = static_cast<int32_t>(kv.sends.size()),
           .dst = packed},
          stream));
    }
    Messages to_peers(sends);
    Messages from_peers(recvs);
    int64_t row = 0;
    for (const HaloSend& send : kv.sends) {
      to_peers.Add(send.peer, packed + row * row_bytes, send.num_tokens * row_bytes);
      row += send.num_tokens;
    }
    for (const HaloPiece& piece : kv.receives) {
      from_peers.Add(piece.owner, halo + piece.halo_row * row_bytes, piece.num_tokens * row_bytes);
    }
    return kernels::TokenRows{
        .own = View(tensor),
        .halo = {.data = halo, .row_stride = row_elements, .head_stride = head_dim},
        .segments = context.Table<kernels::Segment>(context.tables.kv_segments[set]),
        .num_segments = static_cast<int32_t>(kv.segments.size())};
  };

  std::array<BranchTokens, kNumBranchSets> tokens_of_set;
  int sets_done = 0;
  for (const BranchInputs& branch : branches) {
    if (sets_done & branch.branches) continue;
    sets_done |= branch.branches;
    BranchTokens& tokens = tokens_of_set[branch.branches];
    absl::StatusOr<kernels::TokenRows> k = exchange(branch.k, branch.branches, dims.head_dim_qk);
    if (!k.ok()) return k.status();
    absl::StatusOr<kernels::TokenRows> v = exchange(branch.v, branch.branches, dims.head_dim_v);
    if (!v.ok()) return v.status();
    tokens = {.k = *k, .v = *v};
  }

  NSA_RETURN_IF_ERROR(context.communicator->Exchange(sends, recvs, stream));
  int64_t sent = 0;
  for (const comm::SendOp& send : sends) sent += send.num_bytes;
  int64_t got = 0;
  for (const comm::RecvOp& recv : recvs) got += recv.num_bytes;
  context.stats.set_halo_bytes_sent(sent);
  context.stats.set_halo_bytes_received(got);
  return std::array<BranchTokens, 3>{tokens_of_set[branches[0].branches],
                                     tokens_of_set[branches[1].branches],
                                     tokens_of_set[branches[2].branches]};
}

BranchGradients BranchGradientsOf(const PassContext& context, int branches) {
  const kernels::AttentionDims& dims = context.dims;
  const int64_t k_row = int64_t{dims.num_kv_heads} * dims.head_dim_qk;
  const int64_t v_row = int64_t{dims.num_kv_heads} * dims.head_dim_v;
  const int64_t own_rows = context.rank_plan.num_tokens;
  const int64_t halo_rows = context.rank_plan.kv[branches].halo_rows;
  auto* const dk = context.Buffer<float>(kTokenGradientsBuffer);
  float* const dv = dk + own_rows * k_row;
  float* const dk_halo = dv + own_rows * v_row;
  return {.dk = {.own = dk, .halo = dk_halo, .adds = true},
          .dv = {.own = dv, .halo = dk_halo + halo_rows * k_row, .adds = true}};
}

absl::Status ZeroBranchGradients(PassContext& context, int branches, void* stream) {
  const kernels::AttentionDims& dims = context.dims;
  const int64_t rows = context.rank_plan.num_tokens + context.rank_plan.kv[branches].halo_rows;
  return context.kernels->Zero(
      context.Buffer(kTokenGradientsBuffer),
      rows * dims.num_kv_heads * (dims.head_dim_qk + dims.head_dim_v) * int64_t{sizeof(float)},
      stream);
}

absl::Status ReturnHaloGradients(PassContext& context, int branches, void* stream) {
  const BranchKv& kv = context.rank_plan.kv[branches];
  const kernels::AttentionDims& dims = context.dims;
  const BranchGradients gradients = BranchGradientsOf(context, branches);
  auto* const received = context.Buffer<float>(kHaloGradientsBuffer);
  struct Part {
    const kernels::TokenGradients& gradients;
    int64_t row_elements;
    float* received;  // [kv.send_rows,row_elements]
  };
  const int64_t k_row = int64_t{dims.num_kv_heads} * dims.head_dim_qk;
  const Part parts[] = {{gradients.dk, k_row, received},
                        {gradients.dv, int64_t{dims.num_kv_heads} * dims.head_dim_v,
                         received + kv.send_rows * k_row}};

  // The way of the halo backwards: what was received is sent.
  std::vector<comm::SendOp> sends;
  std::vector<comm::RecvOp> recvs;
  int64_t sent = 0, got = 0;
  for (const Part& part : parts) {
    const int64_t row_bytes = part.row_elements * int64_t{sizeof(float)};
    Messages to_owners(sends);
    Messages from_peers(recvs);
    for (const HaloPiece& piece : kv.receives) {
      to_owners.Add(piece.owner,
                    reinterpret_cast<char*>(part.gradients.halo) + piece.halo_row * row_bytes,
                    piece.num_tokens * row_bytes);
      sent += piece.num_tokens * row_bytes;
    }
    int64_t row = 0;
    for (const HaloSend& send : kv.sends) {
      from_peers.Add(send.peer, reinterpret_cast<char*>(part.received) + row * row_bytes,
                     send.num_tokens * row_bytes);
      row += send.num_tokens;
    }
    got += kv.send_rows * row_bytes;
  }
  NSA_RETURN_IF_ERROR(context.communicator->Exchange(sends, recvs, stream));
  context.stats.set_gradient_bytes_sent(context.stats.gradient_bytes_sent() + sent);
  context.stats.set_gradient_bytes_received(context.stats.gradient_bytes_received() + got);

  // A token may have been sent to several peers, and to each once.
  const auto* segments = context.Table<kernels::Segment>(context.tables.send_segments[branches]);
  int64_t row = 0;
  for (size_t begin = 0, end = 0; begin < kv.sends.size(); begin = end) {
    int64_t rows = 0;
    for (; end < kv.sends.size() && kv.sends[end].peer == kv.sends[begin].peer; ++end) {
      rows += kv.sends[end].num_tokens;
    }
    for (const Part& part : parts) {
      NSA_RETURN_IF_ERROR(
          context.kernels->AddRows({.dst = part.gradients.own,
                                    .src = part.received + row * part.row_elements,
                                    .segments = segments + begin,
                                    .num_segments = static_cast<int32_t>(end - begin),
                                    .row_elements = part.row_elements},
                                   stream));
    }
    row += rows;
  }
  return absl::OkStatus();
}

}  // namespace nsa
