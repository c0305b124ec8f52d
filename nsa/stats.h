// Statistics of a call as a person reads them.
#ifndef NSA_STATS_H_
#define NSA_STATS_H_

#include <string>
#include <vector>

#include "nsa/stats.pb.h"

namespace nsa {

// One row a rank and a row of totals: tokens, bytes sent and received by kind, picks before and
// records after deduplication, pieces, memory; then load (flops and its ratio to the mean) and,
// if stages were timed, milliseconds by stage.
std::string FormatTable(const ForwardStats& stats);

// The stages as a trace in Chrome's JSON format (chrome://tracing, Perfetto): a process a rank, a
// thread a track. Ranks are aligned at the begin of the call.
std::string FormatChromeTrace(const ForwardStats& stats);

// Rows of cells as text: columns as wide as their widest cell, right-aligned, two spaces before
// each.
std::string FormatRows(const std::vector<std::vector<std::string>>& rows);

// Bytes with a binary unit, e.g. "1.50 MiB".
std::string FormatBytes(double num_bytes);

}  // namespace nsa

#endif  // NSA_STATS_H_
