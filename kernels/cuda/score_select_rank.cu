#include "kernels/cuda/score_select_rank.cuh"

namespace nsa::kernels::cuda {
namespace {

constexpr int kPolynomials = 0;

template <class T>
cudaError_t LaunchOf(const RankArgs& args, int num_ctas, cudaStream_t stream) {
  switch (args.dims.head_dim_qk) {
    case 64:
      return rank::LaunchRankBlocksOf<T, 64, kPolynomials>(args, num_ctas, stream);
    case 128:
      return rank::LaunchRankBlocksOf<T, 128, kPolynomials>(args, num_ctas, stream);
    default:
      return rank::LaunchRankBlocksOf<T, 192, kPolynomials>(args, num_ctas, stream);
  }
}

}  // namespace

cudaError_t LaunchRankBlocks(const ScoreAndSelectParams& params, const ScoreSelectScratch& scratch,
                             int num_sms, cudaStream_t stream) {
  const RankArgs args = MakeRankArgs(params, scratch);
  return params.dims.dtype == DType::kBF16 ? LaunchOf<__nv_bfloat16>(args, num_sms, stream)
                                           : LaunchOf<__half>(args, num_sms, stream);
}

}  // namespace nsa::kernels::cuda
