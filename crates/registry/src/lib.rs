//! Distribution-spec client and server
