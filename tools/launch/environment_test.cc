#include "tools/launch/environment.h"

#include <map>
#include <string>

#include "gtest/gtest.h"

namespace nsa::tools {
namespace {

absl::StatusOr<ProcessPlace> Find(const std::map<std::string, std::string>& variables) {
  return FindProcessPlace([&variables](const char* name) {
    const auto it = variables.find(name);
    return it == variables.end() ? nullptr : it->second.c_str();
  });
}

std::string ErrorOf(const std::map<std::string, std::string>& variables) {
  const absl::Status status = Find(variables).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  return std::string(status.message());
}

TEST(FindProcessPlaceTest, NothingSetMeansThreads) {
  const auto place = Find({{"HOME", "/root"}, {"RANK", ""}});
  ASSERT_TRUE(place.ok()) << place.status();
  EXPECT_EQ(place->origin, Origin::kThreads);
  EXPECT_EQ(place->size, 1);
}

TEST(FindProcessPlaceTest, MpirunComesFirst) {
  const auto place = Find({{"OMPI_COMM_WORLD_SIZE", "8"},
                           {"OMPI_COMM_WORLD_RANK", "6"},
                           {"OMPI_COMM_WORLD_LOCAL_SIZE", "4"},
                           {"OMPI_COMM_WORLD_LOCAL_RANK", "2"},
                           {"RANK", "1"},
                           {"WORLD_SIZE", "2"}});
  ASSERT_TRUE(place.ok()) << place.status();
  EXPECT_EQ(place->origin, Origin::kMpi);
  EXPECT_EQ(place->size, 8);
  EXPECT_EQ(place->rank, 6);
  EXPECT_EQ(place->num_ranks_on_host, 4);
  EXPECT_EQ(place->local_rank, 2);
}

TEST(FindProcessPlaceTest, TorchrunMeansRendezvous) {
  const auto place =
      Find({{"RANK", "5"}, {"WORLD_SIZE", "8"}, {"LOCAL_RANK", "1"}, {"LOCAL_WORLD_SIZE", "2"}});
  ASSERT_TRUE(place.ok()) << place.status();
  EXPECT_EQ(place->origin, Origin::kRendezvous);
  EXPECT_EQ(place->size, 8);
  EXPECT_EQ(place->rank, 5);
  EXPECT_EQ(place->num_ranks_on_host, 2);
  EXPECT_EQ(place->local_rank, 1);
}

TEST(FindProcessPlaceTest, LocalNumbersAreOptional) {
  auto place = Find({{"RANK", "3"}, {"WORLD_SIZE", "4"}});
  ASSERT_TRUE(place.ok()) << place.status();
  EXPECT_EQ(place->num_ranks_on_host, 4);
  EXPECT_EQ(place->local_rank, 3);
  place = Find({{"RANK", "3"}, {"WORLD_SIZE", "4"}, {"LOCAL_WORLD_SIZE", "2"}});
  ASSERT_TRUE(place.ok()) << place.status();
  EXPECT_EQ(place->num_ranks_on_host, 2);
  EXPECT_EQ(place->local_rank, 1);
}

TEST(FindProcessPlaceTest, NamesWhatIsWrong) {
  EXPECT_EQ(ErrorOf({{"OMPI_COMM_WORLD_SIZE", "many"}}),
            "environment: OMPI_COMM_WORLD_SIZE = \"many\": must be a number in [1, 1048576]");
  EXPECT_EQ(ErrorOf({{"OMPI_COMM_WORLD_SIZE", "4"},
                     {"OMPI_COMM_WORLD_RANK", "0"},
                     {"OMPI_COMM_WORLD_LOCAL_SIZE", "5"}}),
            "environment: OMPI_COMM_WORLD_LOCAL_SIZE = \"5\": must be a number in [1, 4]");
  EXPECT_EQ(ErrorOf({{"RANK", "0"}}), "environment: WORLD_SIZE: must be set");
  EXPECT_EQ(ErrorOf({{"WORLD_SIZE", "2"}}), "environment: RANK: must be set");
  EXPECT_EQ(ErrorOf({{"WORLD_SIZE", "2"}, {"RANK", "2"}}),
            "environment: RANK = \"2\": must be a number in [0, 1]");
  EXPECT_EQ(ErrorOf({{"WORLD_SIZE", "2"}, {"RANK", "0"}, {"LOCAL_RANK", "2"}}),
            "environment: LOCAL_RANK = \"2\": must be a number in [0, 1]");
}

}  // namespace
}  // namespace nsa::tools
