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
                           {"OMPI_COMM_WORLD_RANK", "7"},
                           {"OMPI_COMM_WORLD_LOCAL_SIZE", "4"},
                           {"RANK", "1"},
                           {"WORLD_SIZE", "2"}});
  ASSERT_TRUE(place.ok()) << place.status();
  EXPECT_EQ(place->origin, Origin::kMpi);
  EXPECT_EQ(place->rank, 7);
  EXPECT_EQ(place->size, 8);
  EXPECT_EQ(place->num_ranks_on_host, 4);
}

TEST(FindProcessPlaceTest, TorchrunNamesAMaster) {
  std::map<std::string, std::string> variables = {
      {"RANK", "0"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "host-a"}, {"MASTER_PORT", "29500"}};
  auto place = Find(variables);
  ASSERT_TRUE(place.ok()) << place.status();
  EXPECT_EQ(place->origin, Origin::kRendezvous);
  EXPECT_EQ(place->master_address, "host-a");
  EXPECT_EQ(place->master_port, 29500);
  EXPECT_EQ(place->num_ranks_on_host, 2);

  variables["TORCHELASTIC_USE_AGENT_STORE"] = "True";
  variables["LOCAL_WORLD_SIZE"] = "1";
  place = Find(variables);
  ASSERT_TRUE(place.ok()) << place.status();
  EXPECT_EQ(place->master_port, 29501);
  EXPECT_EQ(place->num_ranks_on_host, 1);
}

TEST(FindProcessPlaceTest, NamesWhatIsWrong) {
  EXPECT_EQ(ErrorOf({{"OMPI_COMM_WORLD_SIZE", "4"}}),
            "environment: OMPI_COMM_WORLD_RANK: must be set beside the others of its kind");
  EXPECT_EQ(ErrorOf({{"OMPI_COMM_WORLD_SIZE", "4"}, {"OMPI_COMM_WORLD_RANK", "4"}}),
            "environment: OMPI_COMM_WORLD_RANK = \"4\": must be a number in [0, 3]");
  EXPECT_EQ(ErrorOf({{"OMPI_COMM_WORLD_SIZE", "many"}, {"OMPI_COMM_WORLD_RANK", "0"}}),
            "environment: OMPI_COMM_WORLD_SIZE = \"many\": must be a number in [1, 1048576]");
  EXPECT_EQ(ErrorOf({{"RANK", "0"}}),
            "environment: WORLD_SIZE: must be set beside the others of its kind");
  EXPECT_EQ(ErrorOf({{"RANK", "0"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "a"}}),
            "environment: MASTER_PORT: must be set beside the others of its kind");
  EXPECT_EQ(
      ErrorOf({{"RANK", "0"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "a"}, {"MASTER_PORT", "0"}}),
      "environment: MASTER_PORT = \"0\": must be a number in [1, 65534]");
}

}  // namespace
}  // namespace nsa::tools
