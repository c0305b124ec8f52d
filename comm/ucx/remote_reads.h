// Reading a peer's memory by messages, where the transport cannot read it by itself, as TCP cannot.
//
// The reader asks for pieces, of which a bounded number is under way; the owner's progress thread
// answers in chunks. Large messages of collective calls travel the same way: their sender offers
// its buffer, the receiver reads it. UCX has protocols for both, but in 1.13 those end the process
// when a TCP connection breaks in their midst (a failed get reply is fatal, a failed zero-copy send
// is completed twice), whereas its plain messages do not.
#ifndef COMM_UCX_REMOTE_READS_H_
#define COMM_UCX_REMOTE_READS_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <vector>

#include "comm/ucx/wire_header.h"
#include "comm/ucx/worker.h"

namespace nsa::comm::ucx {

// All methods are called with the worker's mutex held.
class RemoteReads {
 public:
  RemoteReads(int rank, int max_requests, Worker* worker)
      : rank_(rank), max_requests_(max_requests), worker_(*worker) {}

  // Lets peers read a window.
  void AddWindow(int64_t window, const char* data, int64_t num_bytes);
  void RemoveWindow(int64_t window) { exposed_.erase(window); }

  // Lets `peer` read `data` once; Unfinished until it has, or has refused. Returns its number.
  int64_t Offer(int peer, const void* data, int64_t num_bytes);

  // Reads from the memory of `peer`; Unfinished until all is at `dst`, then calls `done`.
  void Read(int peer, int64_t memory, int64_t offset, int64_t num_bytes, void* dst,
            std::function<void()> done);
  // Declines an offer.
  void Refuse(int peer, int64_t offer);

  // From the MessageHandler.
  void OnMessage(const WireHeader& header, const void* data, size_t num_bytes);
  void OnChunkSent(int64_t memory, int64_t num_bytes);
  void AfterProgress();

  // Forgets all offers and reads: no memory of the caller is touched any more.
  void Abandon();

 private:
  struct Exposed {
    const char* data;
    int64_t num_bytes;
    int peer = -1;             // of an offer: for whom
    int64_t unread_bytes = 0;  // of an offer
  };
  struct ReadJob {
    int peer;
    int64_t left_bytes;
    std::function<void()> done;
  };
  // A part of a job, as large as one request may be.
  struct Piece {
    int64_t job;
    int64_t memory;
    int64_t offset;
    int64_t num_bytes;
    char* dst;
    int64_t left_bytes;
  };

  void StartPieces();
  void Serve(const WireHeader& request);
  void TakeChunk(const WireHeader& header, const void* data, size_t num_bytes);

  const int rank_;
  const int max_requests_;
  Worker& worker_;

  std::map<int64_t, Exposed> exposed_;  // by number: windows above 0, offers below
  int64_t num_offers_ = 0;
  std::vector<WireHeader> to_serve_;  // requests that have come; answered outside of UCP

  std::map<int64_t, ReadJob> jobs_;
  int64_t num_jobs_ = 0;
  std::deque<Piece> waiting_;  // pieces not yet asked for
  std::map<int64_t, Piece> requested_;
  int64_t num_requests_ = 0;
};

}  // namespace nsa::comm::ucx

#endif  // COMM_UCX_REMOTE_READS_H_
